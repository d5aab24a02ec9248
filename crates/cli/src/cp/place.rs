//! Where a copy goes: pure, and the same in both directions (docker/cli, `cli/command/container/cp.go`, and
//! moby/go-archive, `PrepareArchiveCopy`).
//!
//! ```text
//! source   destination        result
//! file f   folder d           d/f
//!          file g             g, replaced
//!          nothing, `d/x`     d/x
//!          nothing, `d/x/`    refused
//! folder f folder d           d/f, or what it holds in d when the source ends in `/.`
//!          file g             refused
//!          nothing, `d/x`     d/x
//! ```

use std::path::{Component, Path, PathBuf};

/// One side of `cp`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// A path on this machine, as it was typed.
    Here(PathBuf),
    /// A path in a guest.
    Guest { vm: String, path: GuestPath },
    /// A tar on standard input or output.
    Stream,
}

/// An absolute path in a guest without `.` and `..`, and what its end said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GuestPath {
    pub(crate) path: PathBuf,
    pub(crate) ending: Ending,
}

/// What the end of a path says about what it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// Nothing.
    Plain,
    /// `/`: a folder.
    Folder,
    /// `/.`: what a folder holds.
    Contents,
}

/// What is copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Source {
    /// Its last component; empty for `/`.
    pub(crate) name: String,
    pub(crate) is_dir: bool,
    pub(crate) ending: Ending,
}

/// What stands where the copy should go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum There {
    Folder,
    Other,
    Nothing,
}

/// Where in the destination the copied thing itself lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Root {
    /// Under this name in the folder.
    Named(String),
    /// What it holds lies in the folder directly.
    Contents,
}

/// Why something cannot be copied there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The source ends like a folder and is none.
    SourceIsNoFolder,
    /// A folder cannot replace a file.
    FolderOverFile,
    /// The destination ends like a folder, and there is a file.
    DestinationIsNoFolder,
    /// The destination ends like a folder, and there is nothing.
    NoSuchFolder,
}

impl Refusal {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::SourceIsNoFolder => "the source is not a folder",
            Self::FolderOverFile => "a folder cannot replace a file",
            Self::DestinationIsNoFolder => "the destination is not a folder",
            Self::NoSuchFolder => "the destination folder does not exist",
        }
    }
}

/// Tells `VM:PATH` from a path, as Docker does it: `/x:y` and `./x:y` are paths.
pub(crate) fn side(text: &str) -> Result<Side, String> {
    if text == "-" {
        return Ok(Side::Stream);
    }
    if text.is_empty() {
        return Err("write a path, VM:PATH, or - for a tar".to_owned());
    }
    match text.split_once(':') {
        Some((vm, path)) if !vm.is_empty() && !vm.starts_with('.') && !vm.contains('/') => Ok(Side::Guest {
            vm: vm.to_owned(),
            path: guest_path(path),
        }),
        _ => Ok(Side::Here(PathBuf::from(text))),
    }
}

/// A path in a guest; a relative one starts at `/`.
fn guest_path(text: &str) -> GuestPath {
    GuestPath {
        path: clean(Path::new(text)),
        ending: ending(text),
    }
}

/// What the end of a path as it was typed says.
pub(crate) fn ending(text: &str) -> Ending {
    if text == "." || text.ends_with("/.") {
        Ending::Contents
    } else if text.ends_with('/') {
        Ending::Folder
    } else {
        Ending::Plain
    }
}

/// The path from `/`, without `.`, and with `..` taken by the letter.
pub(crate) fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    cleaned
}

/// The folder to unpack into, and the copy's place in it.
pub(crate) fn place(
    source: &Source,
    destination: &Path,
    ending: Ending,
    there: There,
) -> Result<(PathBuf, Root), Refusal> {
    if source.ending != Ending::Plain && !source.is_dir {
        return Err(Refusal::SourceIsNoFolder);
    }
    if there == There::Folder {
        let contents = source.is_dir && (source.ending == Ending::Contents || source.name.is_empty());
        let root = if contents {
            Root::Contents
        } else {
            Root::Named(source.name.clone())
        };
        return Ok((destination.to_owned(), root));
    }
    match (there, source.is_dir) {
        (There::Other, true) => return Err(Refusal::FolderOverFile),
        (There::Other, false) if ending != Ending::Plain => return Err(Refusal::DestinationIsNoFolder),
        (There::Nothing, false) if ending != Ending::Plain => return Err(Refusal::NoSuchFolder),
        _ => {}
    }
    // What does not exist or is a file has a name: only `/` has none, and that is a folder.
    let (Some(folder), Some(name)) = (destination.parent(), destination.file_name()) else {
        return Err(Refusal::NoSuchFolder);
    };
    Ok((
        folder.to_owned(),
        Root::Named(name.to_string_lossy().into_owned()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_told_apart() {
        let here = |path: &str| Ok(Side::Here(path.into()));
        let guest = |vm: &str, path: &str, ending| {
            Ok(Side::Guest {
                vm: vm.into(),
                path: GuestPath {
                    path: path.into(),
                    ending,
                },
            })
        };
        for (text, expected) in [
            ("-", Ok(Side::Stream)),
            ("file", here("file")),
            ("/a:b", here("/a:b")),
            ("./a:b", here("./a:b")),
            ("dir/a:b", here("dir/a:b")),
            (":x", here(":x")),
            ("web:/etc", guest("web", "/etc", Ending::Plain)),
            ("web:/etc/", guest("web", "/etc", Ending::Folder)),
            ("web:/etc/.", guest("web", "/etc", Ending::Contents)),
            ("web:etc/../x//y", guest("web", "/x/y", Ending::Plain)),
            ("web:../../x", guest("web", "/x", Ending::Plain)),
            ("web:", guest("web", "/", Ending::Plain)),
            ("web:.", guest("web", "/", Ending::Contents)),
            ("web:/a:b", guest("web", "/a:b", Ending::Plain)),
        ] {
            assert_eq!(side(text), expected, "{text}");
        }
        assert!(side("").is_err());
    }

    #[test]
    fn copies_go_where_docker_puts_them() {
        use Ending::*;
        use There::{Folder as Dir, Nothing, Other};
        let check = |(name, is_dir, source_ending): (&str, bool, Ending),
                     (destination, ending, there): (&str, Ending, There),
                     expected: Result<(&str, Option<&str>), Refusal>| {
            let source = Source {
                name: name.into(),
                is_dir,
                ending: source_ending,
            };
            let found = place(&source, Path::new(destination), ending, there);
            let expected = expected.map(|(dir, name)| {
                (
                    dir.into(),
                    name.map_or(Root::Contents, |name| Root::Named(name.into())),
                )
            });
            assert_eq!(
                found, expected,
                "{source:?} to {destination} {ending:?} {there:?}"
            );
        };
        let (file, dir, contents) = (("f", false, Plain), ("d", true, Plain), ("d", true, Contents));
        check(file, ("/x", Plain, Dir), Ok(("/x", Some("f"))));
        check(file, ("/x", Folder, Dir), Ok(("/x", Some("f"))));
        check(file, ("/x/g", Plain, Other), Ok(("/x", Some("g"))));
        check(file, ("/x/g", Plain, Nothing), Ok(("/x", Some("g"))));
        check(file, ("/x/g", Folder, Nothing), Err(Refusal::NoSuchFolder));
        check(file, ("/x/g", Folder, Other), Err(Refusal::DestinationIsNoFolder));
        check(dir, ("/x", Plain, Dir), Ok(("/x", Some("d"))));
        check(("d", true, Folder), ("/x", Plain, Dir), Ok(("/x", Some("d"))));
        check(contents, ("/x", Plain, Dir), Ok(("/x", None)));
        check(dir, ("/x/y", Plain, Nothing), Ok(("/x", Some("y"))));
        check(dir, ("/x/y", Folder, Nothing), Ok(("/x", Some("y"))));
        check(contents, ("/x/y", Plain, Nothing), Ok(("/x", Some("y"))));
        check(dir, ("/x/y", Plain, Other), Err(Refusal::FolderOverFile));
        check(
            ("f", false, Contents),
            ("/x", Plain, Dir),
            Err(Refusal::SourceIsNoFolder),
        );
        check(("", true, Plain), ("/x", Plain, Dir), Ok(("/x", None)));
        check(dir, ("/", Plain, Dir), Ok(("/", Some("d"))));
    }
}
