//! Choosing experts by groups (DeepSeek-V3's `noaux_tc`). Shared by all host backends, so that they choose alike.

use crate::GroupedRouting;
use crate::host::HostTensor;

/// Experts and weights of one row of router logits: see [`crate::Backend::route_grouped`].
fn route(logits: &[f32], bias: &[f32], routing: &GroupedRouting) -> (Vec<u32>, Vec<f32>) {
    let scores: Vec<f32> = logits.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect();
    let choices: Vec<f32> = scores.iter().zip(bias).map(|(score, bias)| score + bias).collect();
    let group = choices.len() / routing.groups;
    let sums: Vec<f32> = choices.chunks_exact(group).map(two_highest).collect();
    let groups = highest_first(&sums, (0..routing.groups).collect(), routing.chosen_groups);
    let candidates = groups.iter().flat_map(|g| g * group..(g + 1) * group).collect();
    let chosen = highest_first(&choices, candidates, routing.count);
    let sum = match routing.normalise {
        true => chosen.iter().map(|expert| scores[*expert]).sum::<f32>() + 1e-20,
        false => 1.0,
    };
    let weights = chosen.iter().map(|expert| scores[*expert] / sum * routing.scale).collect();
    (chosen.into_iter().map(|expert| expert as u32).collect(), weights)
}

/// The sum of the two highest; of a group of one, its only choice.
fn two_highest(choices: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for choice in choices {
        if *choice > first {
            (first, second) = (*choice, first);
        } else if *choice > second {
            second = *choice;
        }
    }
    if choices.len() < 2 { first } else { first + second }
}

/// The `count` of `candidates` with the highest values, the highest first, the lower number among equals. What is no number
/// counts as the lowest: sorting needs an order of all values.
fn highest_first(values: &[f32], mut candidates: Vec<usize>, count: usize) -> Vec<usize> {
    // Adding 0 makes -0 the 0 that it equals.
    let key = |candidate: &usize| match values[*candidate] {
        value if value.is_nan() => f32::NEG_INFINITY,
        value => value + 0.0,
    };
    candidates.sort_by(|a, b| key(b).total_cmp(&key(a)).then(a.cmp(b)));
    candidates.truncate(count);
    candidates
}

/// [`route`] for each row: the experts, `count` a row, and their weights `[rows, count]`.
pub(crate) fn route_rows(logits: &HostTensor, bias: &[f32], routing: &GroupedRouting) -> (Vec<u32>, HostTensor) {
    let experts = logits.cols;
    assert_eq!(bias.len(), experts, "biases");
    assert!(
        routing.groups > 0
            && experts.is_multiple_of(routing.groups)
            && routing.chosen_groups <= routing.groups
            && routing.count <= experts / routing.groups * routing.chosen_groups,
        "{routing:?} of {experts} experts"
    );
    let (mut chosen, mut weights) = (Vec::new(), Vec::new());
    for row in 0..logits.rows {
        let (experts, scaled) = route(logits.row(row), bias, routing);
        chosen.extend(experts);
        weights.extend(scaled);
    }
    (chosen, HostTensor { rows: logits.rows, cols: routing.count, data: weights })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTING: GroupedRouting =
        GroupedRouting { count: 2, groups: 3, chosen_groups: 1, normalise: false, scale: 1.0 };

    fn logit(score: f32) -> f32 {
        (score / (1.0 - score)).ln()
    }

    #[test]
    fn a_group_counts_by_its_two_best() {
        // The highest expert is in the first group, the highest pair in the last.
        let logits = [0.9, 0.1, 0.2, 0.5, 0.4, 0.3, 0.6, 0.7, 0.1].map(logit);
        let (chosen, weights) = route(&logits, &[0.0; 9], &ROUTING);
        assert_eq!(chosen, [7, 6]);
        assert!((weights[0] - 0.7).abs() < 1e-6 && (weights[1] - 0.6).abs() < 1e-6, "{weights:?}");
    }

    #[test]
    fn the_bias_chooses_but_does_not_weigh() {
        let logits = [0.5; 9].map(logit);
        let mut bias = [0.0; 9];
        (bias[4], bias[5]) = (1.0, 0.5);
        let routing = GroupedRouting { normalise: true, scale: 2.5, ..ROUTING };
        let (chosen, weights) = route(&logits, &bias, &routing);
        assert_eq!((chosen, weights), (vec![4, 5], vec![1.25, 1.25]));
    }

    #[test]
    fn equals_go_to_the_lower_number() {
        let routing = GroupedRouting { chosen_groups: 2, count: 4, ..ROUTING };
        let (chosen, _) = route(&[0.0; 9], &[0.0; 9], &routing);
        assert_eq!(chosen, [0, 1, 2, 3]);
    }

    #[test]
    fn what_is_no_number_comes_last() {
        // As many as sorting in earnest needs, and only then notices that an order is none.
        let values: Vec<f32> = (0..96).map(|i| if i % 3 == 0 { f32::NAN } else { (i * 37 % 96) as f32 }).collect();
        let sorted = highest_first(&values, (0..96).collect(), 96);
        let numbers: Vec<f32> = sorted[..64].iter().map(|i| values[*i]).collect();
        assert!(numbers.is_sorted_by(|a, b| a > b), "{numbers:?}");
        assert_eq!(sorted[64..], (0..96).step_by(3).collect::<Vec<_>>());
        assert_eq!(
            highest_first(&[-0.0, 0.0, -1.0, f32::NEG_INFINITY, f32::NAN], (0..5).collect(), 5),
            [0, 1, 2, 3, 4]
        );
        let routing = GroupedRouting { count: 4, groups: 2, chosen_groups: 2, normalise: true, scale: 1.0 };
        let (chosen, _) = route(&[f32::NAN; 16], &[0.0; 16], &routing);
        assert_eq!(chosen, [0, 1, 2, 3]);
    }

    #[test]
    fn groups_of_one_expert_are_plain_choice() {
        let routing = GroupedRouting { groups: 4, chosen_groups: 2, ..ROUTING };
        let (chosen, _) = route(&[0.1, 0.4, 0.2, 0.3].map(logit), &[0.0; 4], &routing);
        assert_eq!(chosen, [1, 3]);
    }
}
