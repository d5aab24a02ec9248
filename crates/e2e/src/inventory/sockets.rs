//! Unix sockets that somebody holds open, by the path or abstract name they are bound to.

use super::{Scope, said};

/// Their names; those without one are of nobody in particular, and are seen as descriptors. A socket is listed in the
/// network namespace of whoever made it.
pub(super) fn sockets(scope: Scope<'_>) -> Vec<String> {
    const LIST: [&str; 2] = ["cat", "/proc/self/net/unix"];
    let mut lists = vec![said(scope, &LIST)];
    if scope.namespace.is_some() {
        let outside = Scope {
            namespace: None,
            ..scope
        };
        lists.push(said(outside, &LIST));
    }
    // proc_pid_net(5), unix: seven fields, then the path.
    let lines = lists.iter().flat_map(|list| list.lines());
    let names = lines.filter_map(|line| line.splitn(8, ' ').nth(7));
    let mut names: Vec<_> = names
        .filter(|name| scope.marks.are_in(name))
        .map(str::to_owned)
        .collect();
    // A listening socket and each connection to it have the same name, and connections come and go.
    names.sort();
    names.dedup();
    names
}
