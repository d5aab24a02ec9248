//! Laying one layer over the tree of those below it (OCI image specification, layer.md, "Applying Changesets").
//!
//! - A later entry replaces an earlier one, also within a layer. A folder over a folder keeps what is in it; anything
//!   else over a folder removes it with all that is in it.
//! - Whiteouts and opaque markers remove what is from *lower* layers, wherever in the layer they stand: every name
//!   remembers the layer that made it. A folder that stays only because the same layer put something below it is
//!   as if that layer had made it.
//! - An entry below a symbolic link goes where the link points, inside the image: an absolute target starts at the root
//!   of the image. A link that leads out, to nothing or in a circle is refused.
//!
//! Nothing here touches a file system.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::entry::{Change, LayerEntries, LayerEntry, Metadata, NewNode};
use super::error::{EntryProblem, LayerError, shown};
use super::path::{MAX_DEPTH, parts, split};
use super::tree::{Dirent, Inode, InodeId, Node, Tree};

/// How many symbolic links one name may lead through (Linux `MAXSYMLINKS`).
const MAX_LINKS: usize = 40;

/// What to do where a folder on the way is missing.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    Report,
}

impl Tree {
    /// Lays the next layer over the tree. After an error the tree is in between and good for nothing.
    pub fn apply(&mut self, layer: LayerEntries) -> Result<(), LayerError> {
        for entry in layer.entries {
            let LayerEntry { path, change } = entry;
            self.change(&path, change)
                .map_err(|problem| LayerError::entry(layer.layer, &path, problem))?;
        }
        self.layers += 1;
        Ok(())
    }

    fn change(&mut self, path: &[u8], change: Change) -> Result<(), EntryProblem> {
        let (folder, name) = split(path);
        match change {
            Change::Opaque => {
                let dir = self.make_way(path)?;
                self.purge(dir);
            }
            Change::Whiteout => {
                if let Some(dir) = self.walk(folder, Missing::Report)? {
                    self.white_out(dir, name);
                }
            }
            Change::Link { target } => self.link(folder, name, &target)?,
            Change::Put {
                metadata,
                node: NewNode::Dir,
            } if path.is_empty() => {
                self.inode_mut(Self::ROOT).metadata = metadata;
            }
            Change::Put { metadata, node } => {
                let dir = self.make_way(folder)?;
                self.put(dir, name, metadata, node);
            }
        }
        Ok(())
    }

    fn names(&mut self, dir: InodeId) -> &mut BTreeMap<Box<[u8]>, Dirent> {
        match &mut self.inode_mut(dir).node {
            Node::Dir(names) => names,
            _ => unreachable!("a walk ends in a folder"),
        }
    }

    fn child(&self, dir: InodeId, name: &[u8]) -> Option<Dirent> {
        match &self.inode(dir).node {
            Node::Dir(names) => names.get(name).copied(),
            _ => None,
        }
    }

    fn is_dir(&self, id: InodeId) -> bool {
        matches!(self.inode(id).node, Node::Dir(_))
    }

    /// The folder of a normalized path, made where it is missing.
    fn make_way(&mut self, path: &[u8]) -> Result<InodeId, EntryProblem> {
        let found = self.walk(path, Missing::Make)?;
        Ok(found.unwrap_or_else(|| unreachable!("what is missing is made")))
    }

    /// Finds the folder of a normalized path, following symbolic links inside the image.
    ///
    /// `None` only with [`Missing::Report`]: something on the way is not there, or is no folder.
    fn walk(&mut self, path: &[u8], missing: Missing) -> Result<Option<InodeId>, EntryProblem> {
        let mut stack = vec![Self::ROOT];
        // What a link put before the rest of the path, last part first. A part that comes from a link must exist.
        let mut detour: Vec<Box<[u8]>> = Vec::new();
        let mut own = parts(path);
        let mut links = 0;
        let mut last_link = (String::new(), String::new());
        loop {
            let from_link = detour.pop();
            let Some(part) = from_link.as_deref().or_else(|| own.next()) else {
                return Ok(stack.last().copied());
            };
            if part == b".." {
                // Only links have such parts.
                stack.pop();
                if stack.is_empty() {
                    return Err(EntryProblem::LinkClimbs {
                        link: last_link.0,
                        target: last_link.1,
                    });
                }
                continue;
            }
            if stack.len() > MAX_DEPTH {
                return Err(EntryProblem::TooDeep { limit: MAX_DEPTH });
            }
            let here = stack[stack.len() - 1];
            let Some(Dirent { inode, .. }) = self.child(here, part) else {
                match (missing, from_link.is_some()) {
                    (Missing::Report, _) => return Ok(None),
                    (Missing::Make, true) => {
                        return Err(EntryProblem::LinkDangles {
                            link: last_link.0,
                            target: last_link.1,
                        });
                    }
                    (Missing::Make, false) => {
                        stack.push(self.add(here, part, Metadata::implied_dir(), Node::Dir(BTreeMap::new())));
                        continue;
                    }
                }
            };
            match &self.inode(inode).node {
                Node::Dir(_) => stack.push(inode),
                Node::Symlink(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(EntryProblem::LinkLoops);
                    }
                    last_link = (shown(part), shown(target));
                    detour.extend(parts(target).rev().map(Box::from));
                    if target.starts_with(b"/") {
                        stack.truncate(1);
                    }
                }
                _ if missing == Missing::Report => return Ok(None),
                _ => return Err(EntryProblem::ParentNotDir { parent: shown(part) }),
            }
        }
    }

    fn allocate(&mut self, inode: Inode) -> InodeId {
        match self.free.pop() {
            Some(index) => {
                self.inodes[index as usize] = Some(inode);
                InodeId(index)
            }
            None => {
                self.inodes.push(Some(inode));
                // Fits: the limit on entries is far below 2^32.
                InodeId((self.inodes.len() - 1) as u32)
            }
        }
    }

    /// Gives a new inode a name that is free.
    fn add(&mut self, dir: InodeId, name: &[u8], metadata: Metadata, node: Node) -> InodeId {
        let inode = self.allocate(Inode {
            metadata,
            names: 1,
            node,
        });
        let layer = self.layers;
        self.names(dir).insert(name.into(), Dirent { inode, layer });
        inode
    }

    fn put(&mut self, dir: InodeId, name: &[u8], metadata: Metadata, node: NewNode) {
        let layer = self.layers;
        if let Some(old) = self.child(dir, name) {
            if matches!(node, NewNode::Dir) && self.is_dir(old.inode) {
                self.inode_mut(old.inode).metadata = metadata;
                self.names(dir).insert(
                    name.into(),
                    Dirent {
                        inode: old.inode,
                        layer,
                    },
                );
                return;
            }
            self.names(dir).remove(name);
            self.drop_name(old.inode);
        }
        let node = match node {
            NewNode::Dir => Node::Dir(BTreeMap::new()),
            NewNode::File { size, extent } => Node::File { size, extent },
            NewNode::Symlink(target) => Node::Symlink(target),
            NewNode::CharDev { major, minor } => Node::CharDev { major, minor },
            NewNode::BlockDev { major, minor } => Node::BlockDev { major, minor },
            NewNode::Fifo => Node::Fifo,
        };
        self.add(dir, name, metadata, node);
    }

    fn link(&mut self, folder: &[u8], name: &[u8], target: &[u8]) -> Result<(), EntryProblem> {
        let (target_folder, target_name) = split(target);
        let missing = || EntryProblem::HardLinkMissing {
            target: shown(target),
        };
        let found = self.walk(target_folder, Missing::Report)?.ok_or_else(missing)?;
        let inode = match target_name {
            b"" => Self::ROOT,
            _ => self.child(found, target_name).ok_or_else(missing)?.inode,
        };
        if self.is_dir(inode) {
            return Err(EntryProblem::HardLinkToDir {
                target: shown(target),
            });
        }
        // Counted first: the new name may stand where a folder stands that holds the only other one.
        self.inode_mut(inode).names += 1;
        if name.is_empty() {
            return Err(EntryProblem::RootNotDir);
        }
        let dir = self.make_way(folder)?;
        let layer = self.layers;
        if let Some(old) = self.names(dir).insert(name.into(), Dirent { inode, layer }) {
            self.drop_name(old.inode);
        }
        Ok(())
    }

    /// Forgets one name of an inode, and with the last one the inode and all that is in it.
    fn drop_name(&mut self, id: InodeId) {
        let mut gone = vec![id];
        while let Some(id) = gone.pop() {
            let inode = self.inode_mut(id);
            inode.names -= 1;
            if inode.names > 0 {
                continue;
            }
            match self.inodes[id.index()].take().map(|inode| inode.node) {
                Some(Node::Dir(names)) => gone.extend(names.into_values().map(|dirent| dirent.inode)),
                Some(Node::File { size, extent }) if size > 0 => self.orphans.push((extent, size)),
                _ => {}
            }
            self.free.push(id.0);
        }
    }

    /// Removes what lower layers have under one name.
    fn white_out(&mut self, dir: InodeId, name: &[u8]) {
        let layer = self.layers;
        let Some(dirent) = self.child(dir, name) else {
            return;
        };
        match self.settle(dirent) {
            Some(kept) => {
                if let Entry::Occupied(mut entry) = self.names(dir).entry(name.into()) {
                    *entry.get_mut() = Dirent { inode: kept, layer };
                }
            }
            None => {
                self.names(dir).remove(name);
                self.drop_name(dirent.inode);
            }
        }
    }

    /// Removes what lower layers have in a folder; gives whether anything is left. Recursion is as deep as the tree.
    fn purge(&mut self, dir: InodeId) -> bool {
        let layer = self.layers;
        let names = std::mem::take(self.names(dir));
        let mut left = BTreeMap::new();
        for (name, dirent) in names {
            match self.settle(dirent) {
                Some(inode) => {
                    left.insert(name, Dirent { inode, layer });
                }
                None => self.drop_name(dirent.inode),
            }
        }
        let any = !left.is_empty();
        *self.names(dir) = left;
        any
    }

    /// What stays of a name when lower layers' part of it goes: nothing, or the inode with what this layer put there.
    fn settle(&mut self, dirent: Dirent) -> Option<InodeId> {
        let ours = dirent.layer == self.layers;
        if !self.is_dir(dirent.inode) {
            return ours.then_some(dirent.inode);
        }
        let any_left = self.purge(dirent.inode);
        if ours {
            return Some(dirent.inode);
        }
        if any_left {
            self.inode_mut(dirent.inode).metadata = Metadata::implied_dir();
            return Some(dirent.inode);
        }
        None
    }
}
