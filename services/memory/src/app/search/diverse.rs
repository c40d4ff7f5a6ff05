//! Variety among the results.

/// Orders candidates by maximal marginal relevance (Carbonell and Goldstein 1998): the next one is the best by `lambda` times
/// its relevance less `1 - lambda` times its cosine with the nearest one taken before. A candidate without a vector is like
/// no other. `relevance` and `vectors` belong together; the answer has places in them, at most `limit`.
pub fn order(relevance: &[f64], vectors: &[Option<Vec<f32>>], lambda: f64, limit: usize) -> Vec<usize> {
    let mut left: Vec<usize> = (0..relevance.len()).collect();
    // How near each candidate comes to what was taken.
    let mut nearest = vec![0f64; relevance.len()];
    let mut taken = Vec::with_capacity(limit.min(left.len()));
    while taken.len() < limit && !left.is_empty() {
        let worth = |place: usize| lambda * relevance[place] - (1.0 - lambda) * nearest[place];
        let best = left
            .iter()
            .enumerate()
            .max_by(|a, b| worth(*a.1).total_cmp(&worth(*b.1)).then(b.0.cmp(&a.0)));
        let Some((at, place)) = best.map(|(at, place)| (at, *place)) else {
            break;
        };
        left.remove(at);
        taken.push(place);
        for other in &left {
            let cosine = vectors[place]
                .as_ref()
                .zip(vectors[*other].as_ref())
                .map(|(a, b)| cosine(a, b));
            nearest[*other] = nearest[*other].max(cosine.unwrap_or(0.0));
        }
    }
    taken
}

/// Cosine of two vectors of the same size; 0 when one of them is zero.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let sum = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    let norms = (sum(a, a) * sum(b, b)).sqrt();
    if norms > 0.0 { sum(a, b) / norms } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_says_the_same_goes_behind_what_says_something_else() {
        let vectors = [Some(vec![1.0, 0.0]), Some(vec![0.99, 0.1]), Some(vec![0.0, 1.0]), None];
        let relevance = [0.9, 0.89, 0.5, 0.1];
        assert_eq!(order(&relevance, &vectors, 0.5, 3), [0, 2, 3]);
        assert_eq!(order(&relevance, &vectors, 1.0, 4), [0, 1, 2, 3]);
        assert!(order(&[], &[], 0.5, 3).is_empty());
    }
}
