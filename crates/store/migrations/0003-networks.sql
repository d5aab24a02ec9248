-- Networks of VMs.
CREATE TABLE networks (
    name         TEXT PRIMARY KEY NOT NULL,
    bridge       TEXT NOT NULL UNIQUE,   -- the interface
    ipv4         TEXT NOT NULL UNIQUE,   -- `10.87.0.0/24`
    ipv6         TEXT NOT NULL UNIQUE,   -- `fd12:3456:789a::/64`
    created_ms   INTEGER NOT NULL,
    last_ipv4    TEXT                    -- handed out last; the search for a free one goes on behind it
) STRICT;

-- What VMs were given. They come and go with their VM's row; a network with VMs cannot be removed.
CREATE TABLE addresses (
    network      TEXT NOT NULL REFERENCES networks (name),
    ipv4         TEXT NOT NULL,
    ipv6         TEXT NOT NULL,
    mac          TEXT NOT NULL,
    vm_id        TEXT NOT NULL UNIQUE REFERENCES vms (id) ON DELETE CASCADE,
    PRIMARY KEY (network, ipv4),
    UNIQUE (network, ipv6),
    UNIQUE (network, mac)
) STRICT, WITHOUT ROWID;
