//! T5's bias of attention by relative position.

/// The bias of attention by relative position, by bucket.
pub(super) struct RelativeBias {
    /// `[num_buckets, num_heads]`
    pub weight: Vec<f32>,
    pub num_heads: usize,
    pub num_buckets: usize,
    pub max_distance: usize,
    pub is_bidirectional: bool,
}

impl RelativeBias {
    /// The bucket of key minus query position: exact for near ones, logarithmic for far ones, all
    /// beyond `max_distance` together (Raffel et al. 2020, section 2.1; in f32 as published).
    fn bucket(&self, distance: i64) -> usize {
        let (mut num_buckets, mut first) = (self.num_buckets, 0);
        if self.is_bidirectional {
            num_buckets /= 2;
            if distance > 0 {
                first = num_buckets;
            }
        }
        let back = match self.is_bidirectional {
            true => distance.unsigned_abs() as usize,
            false => (-distance).max(0) as usize,
        };
        let num_exact = num_buckets / 2;
        if back < num_exact {
            return first + back;
        }
        let ratio = (back as f32 / num_exact as f32).ln();
        let range = (self.max_distance as f64 / num_exact as f64).ln() as f32;
        let far = (ratio / range * (num_buckets - num_exact) as f32) as usize;
        first + (num_exact + far).min(num_buckets - 1)
    }

    /// `[num_heads, distances]`
    pub fn table(&self, distances: impl Iterator<Item = i64> + Clone) -> Vec<f32> {
        let of_head = |head: usize| {
            let weight = move |distance| self.weight[self.bucket(distance) * self.num_heads + head];
            distances.clone().map(weight)
        };
        (0..self.num_heads).flat_map(of_head).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_distances_have_their_own_bucket_and_far_ones_share() {
        let bias = |is_bidirectional| RelativeBias {
            weight: Vec::new(),
            num_heads: 1,
            num_buckets: 32,
            max_distance: 128,
            is_bidirectional,
        };
        let both = bias(true);
        assert_eq!(
            [0, -1, -7, -8, -16, -127, -5000].map(|d| both.bucket(d)),
            [0, 1, 7, 8, 10, 15, 15]
        );
        assert_eq!([1, 7, 8, 32, 5000].map(|d| both.bucket(d)), [17, 23, 24, 28, 31]);
        let back = bias(false);
        assert_eq!(
            [3, 0, -1, -15, -16, -32, -500].map(|d| back.bucket(d)),
            [0, 0, 1, 15, 16, 21, 31]
        );
    }
}
