-- Operations that are over, with their stages: every kind of them, and no longer for VMs alone. No reference to `vms`:
-- what a VM's removal took is known when the VM is gone. Bounded by `OPERATIONS_KEPT`.
DROP TABLE stages;

CREATE TABLE operations (
    seq          INTEGER PRIMARY KEY AUTOINCREMENT,
    operation    TEXT NOT NULL,          -- the id that the request, events and the log have
    kind         TEXT NOT NULL,
    vm_id        TEXT,
    subject      TEXT NOT NULL,
    began_us     INTEGER NOT NULL,       -- since the epoch
    duration_us  INTEGER NOT NULL,
    outcome      TEXT NOT NULL
) STRICT;

CREATE INDEX operations_of_a_vm ON operations (vm_id, kind);

CREATE TABLE stages (
    seq          INTEGER NOT NULL REFERENCES operations (seq) ON DELETE CASCADE,
    position     INTEGER NOT NULL,
    stage        TEXT NOT NULL,
    within       TEXT,                   -- the stage that it is a part of
    start_us     INTEGER NOT NULL,       -- since the operation began
    duration_us  INTEGER NOT NULL,
    outcome      TEXT NOT NULL,
    PRIMARY KEY (seq, position)
) STRICT, WITHOUT ROWID;
