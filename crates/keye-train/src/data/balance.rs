//! Work shared out evenly (`docs/spec/training.md` §3.7).

/// Gives each load to the group with the least so far, the largest first: indices of the loads of each group. `loads` may
/// be operations ([`training_flops`](crate::training_flops)) or seconds. The fullest group has at most 4/3 of what the best
/// division would give it (Graham 1969).
pub fn balance(loads: &[f64], groups: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..loads.len()).collect();
    order.sort_by(|a, b| loads[*b].total_cmp(&loads[*a]).then(a.cmp(b)));
    let mut shared = vec![(0.0f64, Vec::new()); groups];
    for index in order {
        if let Some((sum, members)) = shared.iter_mut().min_by(|a, b| a.0.total_cmp(&b.0)) {
            *sum += loads[index];
            members.push(index);
        }
    }
    shared.into_iter().map(|(_, members)| members).collect()
}

#[cfg(test)]
mod tests {
    use keye_world::Rng;

    use super::*;

    /// Acceptance test 12 of the spec.
    #[test]
    fn the_fullest_group_has_at_most_a_third_more_than_the_mean() {
        for seed in 0..200 {
            let mut rng = Rng::new(&[seed]);
            let groups = rng.range(1, 16) as usize;
            let loads: Vec<f64> = (0..groups * 8).map(|_| f64::from(rng.range(1, 1000)).powi(2)).collect();
            let shared = balance(&loads, groups);
            let sums: Vec<f64> = shared.iter().map(|group| group.iter().map(|i| loads[*i]).sum()).collect();
            let mean = loads.iter().sum::<f64>() / groups as f64;
            assert!(sums.iter().all(|sum| *sum <= mean * 4.0 / 3.0), "{sums:?}");
            let mut all: Vec<usize> = shared.concat();
            all.sort();
            assert_eq!(all, (0..loads.len()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn equal_loads_go_round() {
        assert_eq!(balance(&[1.0; 4], 2), [vec![0, 2], vec![1, 3]]);
        assert_eq!(balance(&[], 2), [Vec::<usize>::new(), Vec::new()]);
    }
}
