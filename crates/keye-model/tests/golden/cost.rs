//! What an encoding says it costs while it runs is what it was said to cost.

use keye_backend::{Cpu, CpuOptions};
use keye_media::{MediaKind, Patches, Pixels};
use keye_model::{NoTap, Runner};

use crate::support::{FIXTURES, load};

/// Spans of more rows than go through a layer together, and small ones in a group; a clip's frames attend together
/// (Preview) or each for itself (1.5).
#[test]
fn an_encoding_costs_what_was_estimated() {
    for fixture in FIXTURES {
        let mut model = load(fixture, Cpu::new(CpuOptions::default()).unwrap());
        for (kind, grid_thw) in [
            (MediaKind::Image, vec![[1, 36, 40]]),
            (MediaKind::Video, vec![[2, 4, 6], [1, 36, 38]]),
            (MediaKind::Video, vec![[9, 12, 14]]),
        ] {
            let mut patches = Patches { pixels: Pixels::U8(vec![]), grid_thw, hash: [0; 32] };
            patches.pixels = Pixels::U8(vec![9; patches.len() * 588]);
            let expected = model.cost(kind, &patches.grid_thw, 1).vision;
            for at_a_time in [0.0, 1e8] {
                let feature = model.begin_encode(kind, &patches).unwrap();
                let (mut steps, mut flops) = (0, 0.0);
                while model.feature_rows(feature) == 0 {
                    flops += model.encode_step(feature, &patches, at_a_time, &mut NoTap).unwrap().flops;
                    steps += 1;
                }
                assert!(steps > 2, "{steps}");
                let off = (flops / expected - 1.0).abs();
                assert!(off < 1e-9, "{fixture}, {kind:?} {:?}: {flops} for {expected}", patches.grid_thw);
                model.release(feature);
            }
        }
    }
}
