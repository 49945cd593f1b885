//! Packing of panels for the weight gradient: copies that put the operands of a tile side by side.

/// Copies the `N` values at `offset` of each window, one window after the other. Window i begins at
/// `from[window_offsets[i]]`.
#[inline(always)]
pub(crate) fn pack_windows<const N: usize>(from: &[f32], window_offsets: &[u32], offset: usize, to: &mut [f32]) {
    for (window, to) in window_offsets.iter().zip(to.as_chunks_mut::<N>().0) {
        let from = &from[*window as usize + offset..];
        *to = *from.first_chunk().expect("a window lies in its source");
    }
}

/// Copies `NV` registers of `LANES` channels, beginning at `channel`, of each pixel, one pixel
/// after the other. A pixel has `channels` values.
#[inline(always)]
pub(crate) fn pack_rows<const LANES: usize, const NV: usize>(
    from: &[f32],
    channels: usize,
    channel: usize,
    to: &mut [f32],
) {
    for (from, to) in from.chunks_exact(channels).zip(to.chunks_exact_mut(LANES * NV)) {
        // As arrays their length is a constant, and each copy is a register move.
        let (from, to) = (from[channel..channel + LANES * NV].as_chunks::<LANES>().0, to.as_chunks_mut::<LANES>().0);
        to[..NV].copy_from_slice(&from[..NV]);
    }
}
