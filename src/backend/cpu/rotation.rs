use super::Buffer;

pub(super) fn rotation(positions: &[u32], frequencies: &[f32], out: &mut Buffer) {
    let half = frequencies.len();
    out.reshape(positions.len(), 2 * half);
    for (row, &position) in out.values.chunks_exact_mut(2 * half).zip(positions) {
        let (cosines, sines) = row.split_at_mut(half);
        for i in 0..half {
            // The angle is rounded to f32, as in the published implementations; its sine and
            // cosine are then as exact as can be.
            let angle = f64::from(position as f32 * frequencies[i]);
            cosines[i] = angle.cos() as f32;
            sines[i] = angle.sin() as f32;
        }
    }
}
