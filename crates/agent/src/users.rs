//! Users and groups as the guest's own `/etc/passwd` and `/etc/group` know them (passwd(5), group(5)).
//!
//! Pure: text in, numbers out. The rules are Docker's: a number that no line names is used as it is, with group 0.

/// Who a process runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// User id.
    pub(crate) uid: u32,
    /// Primary group id.
    pub(crate) gid: u32,
    /// Supplementary groups, the primary one included.
    pub(crate) groups: Vec<u32>,
    /// Home folder.
    pub(crate) home: String,
}

/// Why a user cannot be found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UserError {
    /// No such user.
    #[error("unable to find user {name}: no matching entries in passwd file")]
    User {
        /// What was asked for.
        name: String,
    },
    /// No such group.
    #[error("unable to find group {name}: no matching entries in group file")]
    Group {
        /// What was asked for.
        name: String,
    },
}

/// Somebody who logs in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Login {
    /// The name.
    pub(crate) name: String,
    /// Who that is.
    pub(crate) identity: Identity,
    /// The shell; empty where the file names none.
    pub(crate) shell: String,
}

/// Who is there also where no file says so.
const ROOT: &str = "root";

struct PasswdLine<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
    shell: &'a str,
}

fn passwd_lines(passwd: &str) -> impl Iterator<Item = PasswdLine<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).unwrap_or_default();
        let shell = fields.next().unwrap_or_default();
        Some(PasswdLine {
            name,
            uid,
            gid,
            home,
            shell,
        })
    })
}

fn group_lines(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

/// Ids are 32 bits, and the last is "none" to the kernel.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id != u32::MAX)
}

/// Finds `user[:group]`, by names or numbers; empty is root.
pub(crate) fn lookup(spec: &str, passwd: &str, group: &str) -> Result<Identity, UserError> {
    let (user, group_spec) = spec
        .split_once(':')
        .map_or((spec, ""), |(user, group)| (user, group));
    let user = if user.is_empty() { "0" } else { user };
    let line = passwd_lines(passwd)
        .find(|line| line.name == user)
        .or_else(|| number(user).and_then(|uid| passwd_lines(passwd).find(|line| line.uid == uid)));
    let (uid, primary, name, home) = match line {
        Some(line) => (line.uid, line.gid, Some(line.name), line.home),
        None => match number(user) {
            Some(uid) => (uid, 0, None, ""),
            None => {
                return Err(UserError::User {
                    name: user.to_owned(),
                });
            }
        },
    };
    let (gid, mut groups) = if group_spec.is_empty() {
        let member = |members: &str| name.is_some_and(|name| members.split(',').any(|member| member == name));
        let groups = group_lines(group)
            .filter(|(_, _, members)| member(members))
            .map(|(_, gid, _)| gid)
            .collect();
        (primary, groups)
    } else {
        // A group that was asked for is the only one.
        let named = group_lines(group)
            .find(|(name, _, _)| *name == group_spec)
            .map(|(_, gid, _)| gid);
        let gid = named
            .or_else(|| number(group_spec))
            .ok_or_else(|| UserError::Group {
                name: group_spec.to_owned(),
            })?;
        (gid, Vec::new())
    };
    groups.push(gid);
    groups.sort_unstable();
    groups.dedup();
    let home = if home.is_empty() { "/" } else { home };
    Ok(Identity {
        uid,
        gid,
        groups,
        home: home.to_owned(),
    })
}

/// Finds who logs in under a name. Root is always there; nobody else is without a line.
pub(crate) fn login(name: &str, passwd: &str, group: &str) -> Option<Login> {
    let line = passwd_lines(passwd).find(|line| line.name == name);
    let (spec, shell) = match &line {
        Some(line) => (line.name, line.shell),
        None if name == ROOT => ("0", ""),
        None => return None,
    };
    let identity = lookup(spec, passwd, group).ok()?;
    Some(Login {
        name: name.to_owned(),
        identity,
        shell: shell.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
        # not a user\n\
        www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin\n\
        broken:x:no:1::/:\n\
        bare:x:44:45\n\
        7:x:70:71:seven:/seven:\n";
    const GROUP: &str = "root:x:0:\nadm:x:4:www-data,bare\nwww-data:x:33:\nstaff:x:50:www-data\n";

    fn check(spec: &str, expected: Result<(u32, u32, &[u32], &str), UserError>) {
        let expected = expected.map(|(uid, gid, groups, home)| Identity {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.to_owned(),
        });
        assert_eq!(lookup(spec, PASSWD, GROUP), expected, "{spec:?}");
    }

    #[test]
    fn users_are_found_as_docker_finds_them() {
        check("", Ok((0, 0, &[0], "/root")));
        check("root", Ok((0, 0, &[0], "/root")));
        check("www-data", Ok((33, 33, &[4, 33, 50], "/var/www")));
        check("33", Ok((33, 33, &[4, 33, 50], "/var/www")));
        check("www-data:staff", Ok((33, 50, &[50], "/var/www")));
        check("www-data:1234", Ok((33, 1234, &[1234], "/var/www")));
        check("1000", Ok((1000, 0, &[0], "/")));
        check("1000:1001", Ok((1000, 1001, &[1001], "/")));
        check(":staff", Ok((0, 50, &[50], "/root")));
        check("bare", Ok((44, 45, &[4, 45], "/")));
        // A name that looks like a number is a name first.
        check("7", Ok((70, 71, &[71], "/seven")));
    }

    #[test]
    fn whoever_has_a_line_can_log_in() {
        let check = |name: &str, expected: Option<(u32, &str)>| {
            let found = login(name, PASSWD, GROUP);
            let found = found.as_ref().map(|login| (login.identity.uid, &*login.shell));
            assert_eq!(found, expected, "{name:?}");
        };
        check("root", Some((0, "/bin/bash")));
        check("www-data", Some((33, "/usr/sbin/nologin")));
        check("bare", Some((44, "")));
        for name in [
            "",
            "nobody",
            "33",
            "www-data:staff",
            "0",
            "broken",
            "# not a user",
        ] {
            check(name, None);
        }
        assert_eq!(login("root", "", "").map(|login| login.identity.uid), Some(0));
        assert_eq!(login("bare", "", ""), None);
    }

    #[test]
    fn unknown_names_are_refused() {
        check(
            "nobody",
            Err(UserError::User {
                name: "nobody".into(),
            }),
        );
        check(
            "broken",
            Err(UserError::User {
                name: "broken".into(),
            }),
        );
        check("-1", Err(UserError::User { name: "-1".into() }));
        check(
            "4294967295",
            Err(UserError::User {
                name: "4294967295".into(),
            }),
        );
        check(
            "root:nogroup",
            Err(UserError::Group {
                name: "nogroup".into(),
            }),
        );
        assert!(lookup("root", "", "").is_err());
        assert_eq!(lookup("", "", "").map(|identity| identity.uid), Ok(0));
    }
}
