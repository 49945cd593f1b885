//! Memory for large results: not zeroed before it is written, and not given back to the system between steps.
//!
//! A step of training makes some hundred large tensors and drops them again. The system hands out such memory page by page, each zeroed
//! at its first touch, which costs more than many a layer. [`Recycler`] keeps large blocks instead; a step of the same shapes as the last
//! finds all of them.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    mem::{ManuallyDrop, MaybeUninit},
    ptr::null_mut,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};

/// Values that nobody has written yet.
pub(crate) fn unwritten(n: usize) -> Vec<MaybeUninit<f32>> {
    let mut values = Vec::with_capacity(n);
    // SAFETY: the capacity is `n`, and a `MaybeUninit` needs no value.
    unsafe { values.set_len(n) };
    values
}

/// The same vector once every value is written.
///
/// # Safety
/// Every value is written.
pub(crate) unsafe fn written(values: Vec<MaybeUninit<f32>>) -> Vec<f32> {
    let mut values = ManuallyDrop::new(values);
    // SAFETY: pointer, length and capacity are the vector's, which is forgotten; the values are written by the contract.
    unsafe { Vec::from_raw_parts(values.as_mut_ptr().cast(), values.len(), values.capacity()) }
}

/// The same slice once every value is written.
///
/// # Safety
/// Every value is written.
pub(crate) unsafe fn written_slice(values: &mut [MaybeUninit<f32>]) -> &mut [f32] {
    // SAFETY: `MaybeUninit<f32>` has the layout of `f32`; the values are written by the contract.
    unsafe { &mut *(std::ptr::from_mut(values) as *mut [f32]) }
}

/// Blocks from this size on are kept.
const LEAST: usize = 1 << 16;

/// Sizes are rounded up to eighths of a power of two, so at most an eighth is lost.
const STEPS: usize = 8;

/// Powers of two from [`LEAST`] on, up to 2^40 bytes.
const POWERS: usize = 24;

/// Blocks of one size that are kept at most.
const MOST: usize = 256;

/// Every kept block begins at a cache line.
const ALIGN: usize = 64;

/// A huge page. Blocks that hold one begin at one, and ask for them: rows of different pixels lie kilobytes apart, and with pages of
/// 4 KiB every tile of a convolution looks up as many pages as it has rows.
const HUGE: usize = 2 << 20;

/// A stack of free blocks of one size.
struct Shelf {
    busy: AtomicBool,
    count: AtomicUsize,
    /// Addresses; only touched by who has set `busy`.
    blocks: [AtomicUsize; MOST],
}

impl Shelf {
    const fn new() -> Self {
        Shelf {
            busy: AtomicBool::new(false),
            count: AtomicUsize::new(0),
            blocks: [const { AtomicUsize::new(0) }; MOST],
        }
    }

    /// Runs `f` alone. A few instructions long, so waiting by spinning is short.
    fn alone<T>(&self, f: impl FnOnce() -> T) -> T {
        while self.busy.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            std::hint::spin_loop();
        }
        let result = f();
        self.busy.store(false, Ordering::Release);
        result
    }

    fn take(&self) -> Option<*mut u8> {
        self.alone(|| {
            let n = self.count.load(Ordering::Relaxed).checked_sub(1)?;
            self.count.store(n, Ordering::Relaxed);
            Some(self.blocks[n].load(Ordering::Relaxed) as *mut u8)
        })
    }

    /// Whether there was room.
    fn put(&self, block: *mut u8) -> bool {
        self.alone(|| {
            let n = self.count.load(Ordering::Relaxed);
            if n == MOST {
                return false;
            }
            self.blocks[n].store(block as usize, Ordering::Relaxed);
            self.count.store(n + 1, Ordering::Relaxed);
            true
        })
    }
}

/// An allocator that keeps blocks of 64 KiB and more for the next of their size; the system's for all others. A program takes it by
/// `#[global_allocator]`. Its memory never shrinks: it is what the largest step needed.
pub struct Recycler {
    shelves: [[Shelf; STEPS]; POWERS],
    /// Large blocks that came from the system.
    fresh: AtomicU64,
}

impl Default for Recycler {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Recycler {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Recycler").field("fresh", &self.fresh()).finish()
    }
}

impl Recycler {
    /// With nothing kept.
    pub const fn new() -> Self {
        Recycler { shelves: [const { [const { Shelf::new() }; STEPS] }; POWERS], fresh: AtomicU64::new(0) }
    }

    /// How many large blocks had to come from the system so far. A steady state adds none.
    pub fn fresh(&self) -> u64 {
        self.fresh.load(Ordering::Relaxed)
    }

    /// Its shelf and the size of all blocks on it; none for what is left to the system.
    fn shelf(&self, layout: Layout) -> Option<(&Shelf, Layout)> {
        if layout.size() < LEAST || layout.align() > ALIGN {
            return None;
        }
        let power = layout.size().ilog2();
        let step = 1usize << (power - STEPS.ilog2());
        let rounded = layout.size().next_multiple_of(step);
        let power = rounded.ilog2();
        let row = self.shelves.get((power - LEAST.ilog2()) as usize)?;
        let shelf = &row[(rounded - (1 << power)) >> (power - STEPS.ilog2())];
        let align = if rounded < HUGE { ALIGN } else { HUGE };
        Some((shelf, Layout::from_size_align(rounded, align).ok()?))
    }

    /// A block that this allocator has never had.
    ///
    /// # Safety
    /// `whole` is of a shelf.
    unsafe fn new_block(&self, whole: Layout, zeroed: bool) -> *mut u8 {
        self.fresh.fetch_add(1, Ordering::Relaxed);
        // SAFETY: a shelf's layout is not of size 0.
        let block = unsafe { System.alloc(whole) };
        #[cfg(target_os = "linux")]
        if whole.align() == HUGE && !block.is_null() {
            // Advice: where the system declines, nothing changes.
            // SAFETY: the pages are the block's own; the advice changes no content.
            unsafe { libc::madvise(block.cast(), whole.size() & !(HUGE - 1), libc::MADV_HUGEPAGE) };
        }
        if zeroed && !block.is_null() {
            // After the advice: the first touch of a page settles its size.
            // SAFETY: the block has this size.
            unsafe { block.write_bytes(0, whole.size()) };
        }
        block
    }
}

// SAFETY: a block on a shelf was allocated by the system with that shelf's layout and is used by nobody; `shelf` depends on the layout
// alone, so a block goes back to where it came from, and to the system with the layout that it was allocated with.
unsafe impl GlobalAlloc for Recycler {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some((shelf, whole)) = self.shelf(layout) else {
            // SAFETY: the caller's.
            return unsafe { System.alloc(layout) };
        };
        // SAFETY: the layout is a shelf's.
        shelf.take().unwrap_or_else(|| unsafe { self.new_block(whole, false) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let Some((shelf, whole)) = self.shelf(layout) else {
            // SAFETY: the caller's.
            return unsafe { System.alloc_zeroed(layout) };
        };
        match shelf.take() {
            Some(block) => {
                // SAFETY: the block has at least this size.
                unsafe { block.write_bytes(0, layout.size()) };
                block
            }
            // SAFETY: the layout is a shelf's.
            None => unsafe { self.new_block(whole, true) },
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match self.shelf(layout) {
            // SAFETY: the caller's.
            None => unsafe { System.dealloc(block, layout) },
            Some((shelf, whole)) => {
                if !shelf.put(block) {
                    // SAFETY: allocated with this layout.
                    unsafe { System.dealloc(block, whole) };
                }
            }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Ok(wanted) = Layout::from_size_align(size, layout.align()) else { return null_mut() };
        match (self.shelf(layout), self.shelf(wanted)) {
            // SAFETY: the caller's.
            (None, None) => unsafe { System.realloc(block, layout, size) },
            (Some((_, old)), Some((_, new))) if old.size() == new.size() => block,
            _ => {
                // SAFETY: both blocks hold the shorter of the two lengths and do not overlap.
                unsafe {
                    let moved = self.alloc(wanted);
                    if !moved.is_null() {
                        moved.copy_from_nonoverlapping(block, layout.size().min(size));
                        self.dealloc(block, layout);
                    }
                    moved
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 4).unwrap()
    }

    #[test]
    fn a_block_is_found_again_by_its_size_and_zeroed_where_asked() {
        let kept = Recycler::new();
        for size in [LEAST, LEAST + 1, 100_000, 131_071, 131_072, 5_000_000] {
            // SAFETY: the blocks hold `size` bytes; each is given back with its layout.
            unsafe {
                let a = kept.alloc(layout(size));
                a.write_bytes(7, size);
                kept.dealloc(a, layout(size));
                let before = kept.fresh();
                let b = kept.alloc_zeroed(layout(size));
                assert_eq!((a, before), (b, kept.fresh()), "{size} bytes");
                assert!((0..size).all(|i| *b.add(i) == 0));
                kept.dealloc(b, layout(size));
            }
        }
    }

    #[test]
    fn growing_keeps_the_content_and_no_block_is_smaller_than_asked() {
        let kept = Recycler::new();
        // SAFETY: as above.
        unsafe {
            let mut block = kept.alloc(layout(1000));
            for i in 0..1000 {
                *block.add(i) = i as u8;
            }
            let mut size = 1000;
            for next in [70_000, 70_001, 300_000, 2_000, 90_000] {
                block = kept.realloc(block, layout(size), next);
                size = next;
                block.add(1000).write_bytes(9, size - 1000);
                assert!((0..1000).all(|i| *block.add(i) == i as u8), "{next} bytes");
            }
            kept.dealloc(block, layout(size));
        }
        for size in (LEAST..LEAST * 9).step_by(997) {
            let (_, whole) = kept.shelf(layout(size)).unwrap();
            assert!(whole.size() >= size && whole.size() <= size + size / 8 + 1, "{size}");
        }
    }
}
