-- What a VM has, or is about to get, in the host's kernel. Written before the thing is made; no reference to `vms`,
-- because a row outlives its VM's until the thing is gone.
CREATE TABLE objects (
    kind     TEXT NOT NULL,
    name     TEXT NOT NULL,
    vm_id    TEXT NOT NULL,
    PRIMARY KEY (kind, name)
) STRICT, WITHOUT ROWID;

CREATE INDEX objects_of_a_vm ON objects (vm_id);

-- The history, bounded by `EVENTS_KEPT`.
CREATE TABLE events (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    time_ms    INTEGER NOT NULL,
    action     TEXT NOT NULL,
    vm_id      TEXT,
    vm_name    TEXT,
    operation  TEXT,
    reason     TEXT NOT NULL
) STRICT;

CREATE INDEX events_by_time ON events (time_ms);

-- Somebody stopped it: `unless-stopped` leaves it so.
ALTER TABLE vms ADD COLUMN held INTEGER NOT NULL DEFAULT 0;

-- Somebody removed it: a daemon that finds this finishes it.
ALTER TABLE vms ADD COLUMN removing INTEGER NOT NULL DEFAULT 0;
