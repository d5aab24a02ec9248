-- What the bases on disk were when they were last looked at. The files say what is; this says what is new, and what went.
CREATE TABLE bases (
    id             TEXT PRIMARY KEY NOT NULL,
    image_digest   TEXT NOT NULL,
    format         INTEGER NOT NULL,     -- of its folder; an earlier version's may lack a seed
    root_bytes     INTEGER NOT NULL,     -- lengths of its files
    overlay_bytes  INTEGER,              -- absent: no overlay seed
    work_bytes     INTEGER,              -- absent: no work seed
    seen_ms        INTEGER NOT NULL      -- when it was first found so
) STRICT;
