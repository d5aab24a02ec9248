CREATE TABLE images (
    reference   TEXT PRIMARY KEY NOT NULL,   -- normalised, `docker.io/library/debian:bookworm`
    digest      TEXT NOT NULL,               -- of the manifest
    created_ms  INTEGER NOT NULL
) STRICT;

CREATE TABLE vms (
    id            TEXT PRIMARY KEY NOT NULL,
    name          TEXT NOT NULL UNIQUE COLLATE NOCASE,
    state         TEXT NOT NULL,
    uid           INTEGER NOT NULL UNIQUE,   -- of the VMM process
    image_digest  TEXT NOT NULL,
    base_id       TEXT NOT NULL,             -- the lease on the base
    kernel_id     TEXT NOT NULL,             -- the lease on the kernel bundle
    definition    TEXT NOT NULL,             -- JSON: what was asked for and what was decided
    machine       TEXT,                      -- JSON: how to find the VMM again, while one may run
    created_ms    INTEGER NOT NULL,
    started_ms    INTEGER,
    finished_ms   INTEGER,
    exit_code     INTEGER,
    exit_reason   TEXT,
    failure       TEXT NOT NULL DEFAULT '[]' -- JSON: why the last start failed
) STRICT;

CREATE TABLE stages (
    vm_id        TEXT NOT NULL REFERENCES vms (id) ON DELETE CASCADE,
    operation    TEXT NOT NULL,
    seq          INTEGER NOT NULL,
    stage        TEXT NOT NULL,
    start_us     INTEGER NOT NULL,
    duration_us  INTEGER NOT NULL,
    outcome      TEXT NOT NULL,
    PRIMARY KEY (vm_id, operation, seq)
) STRICT, WITHOUT ROWID;
