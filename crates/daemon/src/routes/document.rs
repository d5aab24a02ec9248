//! What the OpenAPI document says of every operation alike, so that no route has to repeat it.

use offshoot_api::error::ApiError;
use utoipa::openapi::path::Operation;
use utoipa::openapi::{Content, ContentBuilder, OpenApi, Ref, RefOr, ResponseBuilder};
use utoipa::{PartialSchema, ToSchema};

/// Adds to every operation that it can be refused and that it can fail, both in the one error shape.
pub(super) fn complete(document: &mut OpenApi) {
    let components = document.components.get_or_insert_with(Default::default);
    let mut parts = vec![(ApiError::name().into_owned(), ApiError::schema())];
    ApiError::schemas(&mut parts);
    components.schemas.extend(parts);
    for item in document.paths.paths.values_mut() {
        let operations = [
            &mut item.get,
            &mut item.put,
            &mut item.post,
            &mut item.delete,
            &mut item.head,
            &mut item.options,
            &mut item.patch,
            &mut item.trace,
        ];
        for operation in operations.into_iter().flatten() {
            complete_operation(operation);
        }
    }
}

fn complete_operation(operation: &mut Operation) {
    for (status, what) in [
        ("4XX", "The request is refused, and nothing was done."),
        ("5XX", "It failed."),
    ] {
        let response = ResponseBuilder::new()
            .description(what)
            .content("application/json", error())
            .build();
        operation
            .responses
            .responses
            .insert(status.into(), RefOr::T(response));
    }
}

fn error() -> Content {
    ContentBuilder::new()
        .schema(Some(Ref::from_schema_name(ApiError::name())))
        .build()
}
