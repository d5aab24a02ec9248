//! Names for VMs that were given none.

use offshoot_model::VmName;

const HOW: [&str; 32] = [
    "amber", "bold", "brave", "bright", "brisk", "calm", "clever", "cosy", "crisp", "deft", "eager", "early",
    "fair", "fleet", "fresh", "gentle", "glad", "golden", "keen", "kind", "lively", "lucky", "mellow",
    "mild", "neat", "nimble", "proud", "quick", "quiet", "sunny", "swift", "warm",
];
const WHAT: [&str; 32] = [
    "acorn", "alder", "ash", "aspen", "beech", "birch", "briar", "cedar", "clover", "cypress", "elder",
    "elm", "fern", "fir", "hazel", "heath", "holly", "ivy", "juniper", "larch", "laurel", "linden", "maple",
    "moss", "myrtle", "oak", "pine", "reed", "rowan", "sorrel", "willow", "yew",
];

/// A name such as `brave-hazel-4821`, out of four random bytes.
pub fn random_name(random: &[u8; 4]) -> VmName {
    let number = u16::from_le_bytes([random[2], random[3]]) % 10_000;
    let name = format!(
        "{}-{}-{number:04}",
        HOW[random[0] as usize % 32],
        WHAT[random[1] as usize % 32]
    );
    name.parse().expect("the words and digits make a DNS label")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_makes_a_name() {
        for n in 0..=255 {
            random_name(&[n, n, n, n]);
        }
        assert_eq!(random_name(&[2, 14, 0xd5, 0x12]).as_str(), "brave-hazel-4821");
    }
}
