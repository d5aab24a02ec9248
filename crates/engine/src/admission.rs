//! Whether a VM fits this host, decided before anything of it is made. Pure, but for the ledger of what was promised.
//!
//! ```text
//! create ─► admit_creation(rules, host, promised, memory) ─► refused with a reason, or made
//! start  ─► Ledger::promise(…) ─ admit_start ─► refused, or noted until the VM stops
//! ```
//!
//! A guest's memory is taken from the host page by page as the guest touches it, so a VM of 512 MiB that does little takes
//! 100. Promising somewhat more than there is is therefore normal, up to the ratio `memory_overcommit`; but what guests
//! have touched they do not give back, so each start also looks at what is free right now. Disks are as lazy, and nobody
//! can tell how full they get; all that is refused is to begin something new when the data directory is nearly full,
//! because those that run are hit first by a full disk.
//!
//! Not here: how much one VM may take at most (`capabilities::limits`), and addresses.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use offshoot_model::{ByteSize, ErrorKind, Explain, VmId};

/// What is free for a VM to come up: a Debian guest and its VMM have touched this much when the main process starts.
/// Guests that are smaller need less.
const NEEDED_TO_BOOT: ByteSize = ByteSize::from_mib(192);
/// What is left to the host when a guest has come up: with less, it reclaims memory from whatever else runs.
const LEFT_TO_HOST: ByteSize = ByteSize::from_mib(128);
/// Files and folders that a VM has: disks, logs with their rotations, and some to spare.
const FILES_OF_A_VM: u64 = 32;

/// The daemon's settings that admission goes by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdmissionRules {
    /// How much memory may be promised to VMs that run, as a multiple of the host's.
    pub memory_overcommit: f64,
    /// With less free in the data directory, no VM is created.
    pub disk_reserve: ByteSize,
}

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRoom {
    /// All memory (`MemTotal`).
    pub memory: ByteSize,
    /// What could be had without swapping (`MemAvailable`).
    pub memory_available: ByteSize,
}

/// What the data directory has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataRoom {
    /// Bytes that can be written.
    pub free: ByteSize,
    /// Files that can be made; `None` where the file system makes room for them as they come.
    pub free_inodes: Option<u64>,
    /// User ids that no VM has.
    pub free_uids: u64,
    /// How many there are.
    pub uids: u32,
}

/// What VMs that run were promised together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Promised {
    /// How many VMs.
    pub vms: u64,
    /// Their memory.
    pub memory: ByteSize,
}

/// Why a VM does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is larger than the host.
    #[error("a VM with {asked} of memory does not fit: this host has {host}")]
    LargerThanHost {
        /// What was asked for.
        asked: ByteSize,
        /// What there is.
        host: ByteSize,
    },
    /// Too much was promised.
    #[error(
        "a VM with {asked} of memory does not fit: {promised} are promised to {vms} running VMs, and with this one it may be at most {most}"
    )]
    Promised {
        /// What was asked for.
        asked: ByteSize,
        /// What others have.
        promised: ByteSize,
        /// How many they are.
        vms: u64,
        /// The most.
        most: ByteSize,
    },
    /// The host has too little free right now.
    #[error("a VM does not fit now: {available} of memory are free, and to come up it needs {needed}")]
    Memory {
        /// What is free.
        available: ByteSize,
        /// What it takes.
        needed: ByteSize,
    },
    /// The data directory is nearly full.
    #[error(
        "no VM is created while only {free} are free in the data directory: {reserve} are kept free for those that run"
    )]
    Disk {
        /// What is free.
        free: ByteSize,
        /// What is kept.
        reserve: ByteSize,
    },
    /// The data directory takes hardly any more files.
    #[error("no VM is created while the data directory's file system takes only {free} more files")]
    Inodes {
        /// How many.
        free: u64,
    },
    /// Every user id has its VM.
    #[error("all {count} user ids for VMMs are in use")]
    Uids {
        /// How many there are.
        count: u32,
    },
}

impl Explain for Refusal {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Disk { .. } | Self::Inodes { .. } => ErrorKind::NoSpace,
            _ => ErrorKind::NotPossible,
        }
    }

    fn hints(&self) -> Vec<String> {
        let hint = match self {
            Self::LargerThanHost { .. } => "ask for less with `--memory`",
            Self::Promised { .. } => {
                "stop VMs that are not needed (`offshoot stats` shows what they take), ask for less with `--memory`, or raise `memory_overcommit` in the daemon's config"
            }
            Self::Memory { .. } => {
                "stop VMs or other programs; `offshoot stats` shows what VMs take, `free -m` what the host has"
            }
            Self::Disk { .. } => {
                "make room with `offshoot prune` or `offshoot rm`; `offshoot df` shows what takes it. `disk_reserve_mib` in the daemon's config says how much is kept"
            }
            Self::Inodes { .. } => "make room with `offshoot prune` or `offshoot rm`; see `df -i`",
            Self::Uids { .. } => "remove VMs with `offshoot rm`, or raise `uid_count` in the daemon's config",
        };
        vec![hint.to_owned()]
    }
}

/// Whether a VM with this much memory may be created. It may be started as things are, so what keeps it from starting
/// keeps it from being made.
pub fn admit_creation(
    rules: &AdmissionRules,
    host: &HostRoom,
    data: &DataRoom,
    promised: Promised,
    memory: ByteSize,
) -> Result<(), Refusal> {
    admit_start(rules, host, promised, memory)?;
    if data.free < rules.disk_reserve {
        return Err(Refusal::Disk {
            free: data.free,
            reserve: rules.disk_reserve,
        });
    }
    if let Some(free) = data.free_inodes.filter(|free| *free < FILES_OF_A_VM) {
        return Err(Refusal::Inodes { free });
    }
    if data.free_uids == 0 {
        return Err(Refusal::Uids { count: data.uids });
    }
    Ok(())
}

/// Whether a VM with this much memory may be started beside those that run.
pub fn admit_start(
    rules: &AdmissionRules,
    host: &HostRoom,
    promised: Promised,
    memory: ByteSize,
) -> Result<(), Refusal> {
    if memory > host.memory {
        return Err(Refusal::LargerThanHost {
            asked: memory,
            host: host.memory,
        });
    }
    let most = most_promised(rules, host);
    if promised.memory.bytes().saturating_add(memory.bytes()) > most.bytes() {
        return Err(Refusal::Promised {
            asked: memory,
            promised: promised.memory,
            vms: promised.vms,
            most,
        });
    }
    let needed = ByteSize::from_bytes(memory.min(NEEDED_TO_BOOT).bytes() + LEFT_TO_HOST.bytes());
    if host.memory_available < needed {
        return Err(Refusal::Memory {
            available: host.memory_available,
            needed,
        });
    }
    Ok(())
}

/// How much may be promised; never less than the host has, so that one VM of that size can be.
pub fn most_promised(rules: &AdmissionRules, host: &HostRoom) -> ByteSize {
    let ratio = rules.memory_overcommit.max(1.0);
    ByteSize::from_bytes((host.memory.bytes() as f64 * ratio) as u64)
}

/// What VMs that run were promised. Two starts at one moment see each other in it.
#[derive(Debug, Default)]
pub struct Ledger {
    promises: Mutex<HashMap<VmId, ByteSize>>,
}

impl Ledger {
    /// Notes a promise if it can be kept, in one step. A VM has at most one: a second replaces it.
    pub fn promise(
        &self,
        vm: &VmId,
        memory: ByteSize,
        admit: impl FnOnce(Promised) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let mut promises = self.promises.lock().unwrap_or_else(PoisonError::into_inner);
        admit(sum(promises
            .iter()
            .filter(|(other, _)| *other != vm)
            .map(|(_, memory)| *memory)))?;
        promises.insert(vm.clone(), memory);
        Ok(())
    }

    /// Notes what a VM has that runs already.
    pub fn found(&self, vm: &VmId, memory: ByteSize) {
        let mut promises = self.promises.lock().unwrap_or_else(PoisonError::into_inner);
        promises.insert(vm.clone(), memory);
    }

    /// The VM does not run any more.
    pub fn release(&self, vm: &VmId) {
        let mut promises = self.promises.lock().unwrap_or_else(PoisonError::into_inner);
        promises.remove(vm);
    }

    /// All promises together.
    pub fn promised(&self) -> Promised {
        let promises = self.promises.lock().unwrap_or_else(PoisonError::into_inner);
        sum(promises.values().copied())
    }
}

fn sum(promises: impl Iterator<Item = ByteSize>) -> Promised {
    promises.fold(Promised::default(), |sum, memory| Promised {
        vms: sum.vms + 1,
        memory: ByteSize::from_bytes(sum.memory.bytes().saturating_add(memory.bytes())),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const RULES: AdmissionRules = AdmissionRules {
        memory_overcommit: 1.5,
        disk_reserve: ByteSize::from_mib(256),
    };

    fn mib(mib: u64) -> ByteSize {
        ByteSize::from_mib(mib)
    }

    fn host(total_mib: u64, available_mib: u64) -> HostRoom {
        HostRoom {
            memory: mib(total_mib),
            memory_available: mib(available_mib),
        }
    }

    fn promised(vms: u64, each_mib: u64) -> Promised {
        Promised {
            vms,
            memory: mib(vms * each_mib),
        }
    }

    const DATA: DataRoom = DataRoom {
        free: ByteSize::from_mib(10_000),
        free_inodes: Some(100_000),
        free_uids: 10,
        uids: 65_000,
    };

    #[test]
    fn what_fits_is_started_and_what_does_not_is_refused() {
        const TOTAL: u64 = 24_105;
        let check = |available, promised, asked, expected: Option<&str>| {
            let answer = admit_start(&RULES, &host(TOTAL, available), promised, mib(asked));
            match (answer, expected) {
                (Ok(()), None) => {}
                (Err(refusal), Some(expected)) => {
                    assert!(refusal.to_string().contains(expected), "{refusal}");
                    assert!(!refusal.hints().is_empty(), "{refusal}");
                }
                (answer, expected) => panic!("{answer:?}, expected {expected:?}"),
            }
        };
        // Fifty small ones on a usual host, and the last that fits.
        check(20_000, promised(49, 256), 256, None);
        check(20_000, promised(70, 512), 256, None);
        check(20_000, promised(70, 512), 512, Some("promised to 70 running VMs"));
        // One as large as the host, and one that is larger.
        check(20_000, promised(0, 0), TOTAL, None);
        check(20_000, promised(0, 0), TOTAL + 1, Some("this host has 23.5GiB"));
        // Little is free: large guests need 192 MiB to come up, small ones what they have, and the host 128.
        check(320, promised(1, 512), 4096, None);
        check(319, promised(1, 512), 4096, Some("needs 320MiB"));
        check(192, promised(1, 512), 64, None);
        check(191, promised(1, 512), 64, Some("191MiB of memory are free"));
    }

    #[test]
    fn nothing_is_created_on_a_full_disk() {
        let check = |data: DataRoom, expected: Option<Refusal>| {
            let answer = admit_creation(&RULES, &host(4096, 4096), &data, Promised::default(), mib(512));
            assert_eq!(answer.err(), expected);
        };
        check(DATA, None);
        let (free, reserve) = (mib(255), mib(256));
        check(DataRoom { free, ..DATA }, Some(Refusal::Disk { free, reserve }));
        check(
            DataRoom {
                free: reserve,
                ..DATA
            },
            None,
        );
        let inodes = |free_inodes| DataRoom { free_inodes, ..DATA };
        check(inodes(Some(31)), Some(Refusal::Inodes { free: 31 }));
        check(inodes(None), None);
        let none = DataRoom { free_uids: 0, ..DATA };
        check(none, Some(Refusal::Uids { count: 65_000 }));
    }

    #[test]
    fn a_ledger_counts_each_vm_once() {
        let ledger = Ledger::default();
        let vm = |n| VmId::from_bytes(&[n; 6]);
        let most = |most_mib| {
            move |promised: Promised| match promised.memory <= mib(most_mib) {
                true => Ok(()),
                false => Err(Refusal::Uids { count: 0 }),
            }
        };
        ledger.promise(&vm(1), mib(100), most(0)).unwrap();
        ledger.promise(&vm(1), mib(200), most(0)).unwrap();
        assert_eq!(ledger.promised(), promised(1, 200));
        ledger.promise(&vm(2), mib(200), most(100)).unwrap_err();
        ledger.found(&vm(3), mib(50));
        assert_eq!(
            ledger.promised(),
            Promised {
                vms: 2,
                memory: mib(250)
            }
        );
        for n in [1, 2, 3] {
            ledger.release(&vm(n));
        }
        assert_eq!(ledger.promised(), Promised::default());
    }

    proptest! {
        #[test]
        fn less_of_everything_is_never_refused_where_more_was_not(
            total in 1u64..100_000,
            available in 0u64..100_000,
            vms in 0u64..100,
            each in 1u64..2000,
            asked in 1u64..100_000,
            less in 0.0f64..1.0,
            ratio in 0.0f64..4.0,
        ) {
            let rules = AdmissionRules { memory_overcommit: ratio, ..RULES };
            let fewer = |n: u64| (n as f64 * less) as u64;
            if admit_start(&rules, &host(total, available), promised(vms, each), mib(asked)).is_ok() {
                prop_assert!(asked <= total);
                let smaller = admit_start(&rules, &host(total, available), promised(fewer(vms), each), mib(fewer(asked)));
                prop_assert_eq!(smaller, Ok(()));
                let larger_host = admit_start(&rules, &host(total + 1, available + 1), promised(vms, each), mib(asked));
                prop_assert_eq!(larger_host, Ok(()));
            }
        }

        #[test]
        fn no_more_is_ever_promised_than_the_rule_says(
            total in 1u64..10_000,
            asks in proptest::collection::vec((0u8..8, 1u64..3000, any::<bool>()), 0..60),
        ) {
            let (ledger, host) = (Ledger::default(), host(total, 10_000));
            for (n, asked, stops) in asks {
                let vm = VmId::from_bytes(&[n; 6]);
                if stops {
                    ledger.release(&vm);
                } else {
                    let _ = ledger.promise(&vm, mib(asked), |promised| admit_start(&RULES, &host, promised, mib(asked)));
                }
                prop_assert!(ledger.promised().memory <= most_promised(&RULES, &host));
            }
        }
    }
}
