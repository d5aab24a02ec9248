-- Whether a VM's last start booted its kernel or restored a template, and why; JSON of the engine's own type.
ALTER TABLE vms ADD COLUMN boot TEXT;
