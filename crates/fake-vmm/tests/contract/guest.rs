//! Guests of a few bytes: an ELF that QEMU boots as a kernel by PVH (Xen's `docs/misc/pvh.pandoc`).
//!
//! They start in 32-bit protected mode with flat segments at [`LOAD`].

/// Where the code lies in guest memory, and in the file after the headers.
const LOAD: u32 = 0x10_0000;
const CODE_OFFSET: u64 = 0x200;
/// Six zero bytes in front of the code: an interrupt table without entries.
const EMPTY_TABLE: u32 = LOAD;
const ENTRY: u32 = LOAD + 16;
/// The sleep control register of `microvm`'s ACPI (QEMU's `include/hw/i386/microvm.h`, `hw/acpi/ged.h`).
const SLEEP_CONTROL: u32 = 0xfea0_0200;
/// "Sleep enable" and sleep type 5, off (ACPI, "Sleep Control Register").
const SWITCH_OFF: u8 = 0x20 | (5 << 2);

/// What a guest does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End {
    /// Sleeps for good.
    Idle,
    /// Switches itself off after a while.
    PowerOff,
    /// Crashes so hard that the processor resets.
    Reset,
}

/// An ELF kernel that prints a text to the serial port and then does `end`.
pub(crate) fn kernel(says: &str, end: End) -> Vec<u8> {
    let mut code = Vec::new();
    for byte in says.bytes() {
        // mov dx, 0x3f8; mov al, byte; out dx, al
        code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, byte, 0xee]);
    }
    if !matches!(end, End::Idle) {
        // mov ecx, n; dec ecx; jnz: long enough for a test to look at it running, under TCG.
        code.push(0xb9);
        code.extend(100_000_000u32.to_le_bytes());
        code.extend([0x49, 0x75, 0xfd]);
    }
    match end {
        End::Idle => {}
        End::PowerOff => {
            // mov byte [SLEEP_CONTROL], SWITCH_OFF
            code.extend([0xc6, 0x05]);
            code.extend(SLEEP_CONTROL.to_le_bytes());
            code.push(SWITCH_OFF);
        }
        End::Reset => {
            // lidt [EMPTY_TABLE]; int3
            code.extend([0x0f, 0x01, 0x1d]);
            code.extend(EMPTY_TABLE.to_le_bytes());
            code.push(0xcc);
        }
    }
    // cli; hlt; jmp to the hlt
    code.extend([0xfa, 0xf4, 0xeb, 0xfd]);
    elf(&code)
}

/// How a guest ends that runs on KVM.
#[derive(Clone, Copy, Debug)]
pub(crate) enum KvmEnd {
    /// Sleeps for good.
    Idle,
    /// Writes a byte to a port after a second or two: what switches its machine off, or resets it.
    Port(u16, u8),
}

/// The same kernel for KVM, whose guests wait by the time-stamp counter: how fast they run is anybody's guess.
pub(crate) fn kvm_kernel(says: &str, end: KvmEnd) -> Vec<u8> {
    let mut code = Vec::new();
    for byte in says.bytes() {
        code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, byte, 0xee]);
    }
    if let KvmEnd::Port(port, byte) = end {
        // rdtsc; mov ecx, edx; add ecx, 2; rdtsc; cmp edx, ecx; jb to the rdtsc: two times 2^32 ticks.
        code.extend([
            0x0f, 0x31, 0x89, 0xd1, 0x83, 0xc1, 0x02, 0x0f, 0x31, 0x39, 0xca, 0x72, 0xfa,
        ]);
        code.extend([0x66, 0xba]);
        code.extend(port.to_le_bytes());
        code.extend([0xb0, byte, 0xee]);
    }
    code.extend([0xfa, 0xf4, 0xeb, 0xfd]);
    elf(&code)
}

fn elf(code: &[u8]) -> Vec<u8> {
    let note_offset = 0x100u64;
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // ET_EXEC, EM_X86_64, version, entry, phoff, shoff, flags, ehsize, phentsize, phnum, shentsize, shnum, shstrndx
    out.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    out.extend(u64::from(ENTRY).to_le_bytes());
    out.extend(64u64.to_le_bytes());
    out.extend([0; 8 + 4]);
    for half in [64u16, 56, 2, 64, 0, 0] {
        out.extend(half.to_le_bytes());
    }
    let loaded = 16 + code.len() as u64;
    // type, flags; offset, virtual and physical address, size in the file and in memory, alignment
    for (kind, flags, offset, address, size, align) in [
        (1u32, 7u32, CODE_OFFSET, u64::from(LOAD), loaded, 0x1000u64),
        (4, 4, note_offset, 0, 24, 4),
    ] {
        out.extend(kind.to_le_bytes());
        out.extend(flags.to_le_bytes());
        for word in [offset, address, address, size, size, align] {
            out.extend(word.to_le_bytes());
        }
    }
    out.resize(usize::try_from(note_offset).unwrap(), 0);
    // XEN_ELFNOTE_PHYS32_ENTRY
    for word in [4u32, 8, 18] {
        out.extend(word.to_le_bytes());
    }
    out.extend(b"Xen\0");
    out.extend(u64::from(ENTRY).to_le_bytes());
    out.resize(usize::try_from(CODE_OFFSET).unwrap(), 0);
    out.extend([0; 16]);
    out.extend(code);
    out
}
