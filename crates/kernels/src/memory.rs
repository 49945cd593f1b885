//! Memory for large results: not zeroed before it is written, and not returned to the system
//! between steps.
//!
//! A training step allocates and drops some hundred large tensors. The system hands out such memory
//! page by page and zeroes each page at its first touch, which takes longer than
//! many layers compute.
//! [`Recycler`] keeps large blocks instead, and a step with the shapes of the previous one finds
//! all of them.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    mem::{ManuallyDrop, MaybeUninit},
    ptr::null_mut,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
};

/// Allocates `n` uninitialized values.
pub(crate) fn uninit_vec<T: Plain>(n: usize) -> Vec<MaybeUninit<T>> {
    let mut values = Vec::with_capacity(n);
    // SAFETY: the capacity is at least `n`, and a `MaybeUninit` needs no value.
    unsafe { values.set_len(n) };
    values
}

/// Converts a vector whose values have all been written.
///
/// # Safety
///
/// * Every value is initialized.
pub(crate) unsafe fn assume_init_vec<T: Plain>(values: Vec<MaybeUninit<T>>) -> Vec<T> {
    let mut values = ManuallyDrop::new(values);
    // SAFETY: pointer, length and capacity are those of the vector, which is not dropped; the
    // layout of `MaybeUninit<T>` is that of `T`, and the values are initialized by the contract.
    unsafe { Vec::from_raw_parts(values.as_mut_ptr().cast(), values.len(), values.capacity()) }
}

/// Reborrows initialized values for a function that overwrites uninitialized ones.
///
/// # Safety
///
/// * No uninitialized value is written through the result.
pub(crate) unsafe fn as_uninit<T: Copy>(values: &mut [T]) -> &mut [MaybeUninit<T>] {
    // SAFETY: the layouts are the same, and the values stay initialized by the contract.
    unsafe { &mut *(std::ptr::from_mut(values) as *mut [MaybeUninit<T>]) }
}

/// A cache line.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct CacheLine([u32; 16]);

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for crate::simd::Bf16 {}
}

/// Types of which any bits are a value, and that fit a cache line without a gap. Only f32 and bf16
/// implement it.
pub trait Plain: Copy + Send + Sync + 'static + sealed::Sealed {}

impl Plain for f32 {}
impl Plain for crate::simd::Bf16 {}

/// Buffer of plain values that begins at a cache line.
#[derive(Debug, Default)]
pub(crate) struct AlignedBuffer(Vec<CacheLine>);

impl AlignedBuffer {
    /// Returns the first `n` values. The buffer is enlarged by zeros if necessary.
    pub fn grow<T: Plain>(&mut self, n: usize) -> &mut [T] {
        let lines = (n * size_of::<T>()).div_ceil(size_of::<CacheLine>());
        if self.0.len() < lines {
            self.0.resize(lines, CacheLine([0; 16]));
        }
        // SAFETY: the lines hold the values, their alignment is no less strict, and any bits are a
        // value.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), n) }
    }

    /// Returns the first `n` values.
    ///
    /// # Panics
    ///
    /// If the buffer holds fewer.
    pub fn get<T: Plain>(&self, n: usize) -> &[T] {
        assert!(n * size_of::<T>() <= self.0.len() * size_of::<CacheLine>(), "the buffer holds {n} values");
        // SAFETY: the lines hold the values by the assertion, their alignment is no less strict,
        // and any bits are a value.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), n) }
    }
}

/// Least size of a block that is kept, in bytes.
const MIN_BLOCK: usize = 1 << 16;

/// Size classes per power of two. Sizes are rounded up to the next class, so at most an eighth of a
/// block is lost.
const CLASSES: usize = 8;

/// Powers of two from [`MIN_BLOCK`] on, up to 2^40 bytes.
const POWERS: usize = 24;

/// Maximum number of blocks kept per size class.
const POOL_CAPACITY: usize = 256;

/// Alignment of all kept blocks: a cache line.
const ALIGN: usize = 64;

/// Size of a huge page. Blocks of at least this size are aligned to it and ask for huge pages: the
/// rows that a tile of a convolution reads lie kilobytes apart, and with pages of 4 KiB each tile
/// would look up as many pages as it has rows.
const HUGE_PAGE: usize = 2 << 20;

/// Pool of free blocks of one size: a stack.
struct BufferPool {
    locked: AtomicBool,
    count: AtomicUsize,
    /// Addresses; accessed only by the holder of the lock.
    blocks: [AtomicUsize; POOL_CAPACITY],
}

impl BufferPool {
    const fn new() -> Self {
        BufferPool {
            locked: AtomicBool::new(false),
            count: AtomicUsize::new(0),
            blocks: [const { AtomicUsize::new(0) }; POOL_CAPACITY],
        }
    }

    /// Runs `f` under the lock. It takes a few instructions, so a spin lock is enough; a mutex
    /// might allocate.
    fn with_lock<T>(&self, f: impl FnOnce() -> T) -> T {
        while self.locked.compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            std::hint::spin_loop();
        }
        let result = f();
        self.locked.store(false, Ordering::Release);
        result
    }

    /// Takes a block out of the pool.
    fn take(&self) -> Option<*mut u8> {
        self.with_lock(|| {
            let n = self.count.load(Ordering::Relaxed).checked_sub(1)?;
            self.count.store(n, Ordering::Relaxed);
            Some(self.blocks[n].load(Ordering::Relaxed) as *mut u8)
        })
    }

    /// Puts a block into the pool. Returns `false` if the pool is full.
    fn put(&self, block: *mut u8) -> bool {
        self.with_lock(|| {
            let n = self.count.load(Ordering::Relaxed);
            if n == POOL_CAPACITY {
                return false;
            }
            self.blocks[n].store(block as usize, Ordering::Relaxed);
            self.count.store(n + 1, Ordering::Relaxed);
            true
        })
    }
}

/// Allocator that keeps freed blocks of 64 KiB and more in buffer pools for the next allocation of
/// their size. Smaller blocks come from the system allocator.
///
/// A program installs it with `#[global_allocator]`. Its memory never shrinks: it stays at what the
/// largest step needed.
pub struct Recycler {
    /// By power of two and size class.
    pools: [[BufferPool; CLASSES]; POWERS],
    system_allocations: AtomicU64,
}

impl Default for Recycler {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Recycler {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Recycler").field("system_allocations", &self.system_allocations()).finish()
    }
}

impl Recycler {
    /// Creates an allocator with empty pools.
    pub const fn new() -> Self {
        Recycler {
            pools: [const { [const { BufferPool::new() }; CLASSES] }; POWERS],
            system_allocations: AtomicU64::new(0),
        }
    }

    /// Number of large blocks that came from the system so far. In a steady state it stays
    /// constant.
    pub fn system_allocations(&self) -> u64 {
        self.system_allocations.load(Ordering::Relaxed)
    }

    /// Returns the pool of a layout, and the layout of all its blocks; `None` for what is left to
    /// the system.
    fn pool(&self, layout: Layout) -> Option<(&BufferPool, Layout)> {
        if layout.size() < MIN_BLOCK || layout.align() > ALIGN {
            return None;
        }
        let power = layout.size().ilog2();
        let step = 1usize << (power - CLASSES.ilog2());
        let rounded = layout.size().next_multiple_of(step);
        let power = rounded.ilog2();
        let row = self.pools.get((power - MIN_BLOCK.ilog2()) as usize)?;
        let pool = &row[(rounded - (1 << power)) >> (power - CLASSES.ilog2())];
        let align = if rounded < HUGE_PAGE { ALIGN } else { HUGE_PAGE };
        Some((pool, Layout::from_size_align(rounded, align).ok()?))
    }

    /// Allocates a block from the system.
    ///
    /// # Safety
    ///
    /// * `whole` is the layout of a pool.
    unsafe fn new_block(&self, whole: Layout, zeroed: bool) -> *mut u8 {
        self.system_allocations.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the layout of a pool has a size above 0.
        let block = unsafe { System.alloc(whole) };
        #[cfg(target_os = "linux")]
        if whole.align() == HUGE_PAGE && !block.is_null() {
            // If the system declines the advice, nothing changes.
            // SAFETY: the pages belong to the block, and the advice changes no content.
            unsafe { libc::madvise(block.cast(), whole.size() & !(HUGE_PAGE - 1), libc::MADV_HUGEPAGE) };
        }
        if zeroed && !block.is_null() {
            // After the advice: the first touch of a page decides on its size.
            // SAFETY: the block has this size.
            unsafe { block.write_bytes(0, whole.size()) };
        }
        block
    }
}

// SAFETY: a block in a pool has been allocated by the system with the pool's layout, and nothing
// uses it. `pool` depends on the layout alone, so a block returns to the pool it came from, and to
// the system with the layout it was allocated with.
unsafe impl GlobalAlloc for Recycler {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some((pool, whole)) = self.pool(layout) else {
            // SAFETY: the caller's contract is the system allocator's.
            return unsafe { System.alloc(layout) };
        };
        // SAFETY: the layout is that of a pool.
        pool.take().unwrap_or_else(|| unsafe { self.new_block(whole, false) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let Some((pool, whole)) = self.pool(layout) else {
            // SAFETY: the caller's contract is the system allocator's.
            return unsafe { System.alloc_zeroed(layout) };
        };
        match pool.take() {
            Some(block) => {
                // SAFETY: a pool's block has at least this size.
                unsafe { block.write_bytes(0, layout.size()) };
                block
            }
            // SAFETY: the layout is that of a pool.
            None => unsafe { self.new_block(whole, true) },
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match self.pool(layout) {
            // SAFETY: the caller's contract is the system allocator's.
            None => unsafe { System.dealloc(block, layout) },
            Some((pool, whole)) => {
                if !pool.put(block) {
                    // SAFETY: the block was allocated with this layout.
                    unsafe { System.dealloc(block, whole) };
                }
            }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Ok(wanted) = Layout::from_size_align(size, layout.align()) else { return null_mut() };
        match (self.pool(layout), self.pool(wanted)) {
            // SAFETY: the caller's contract is the system allocator's.
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
    fn reuses_blocks_by_size_and_zeroes_on_request() {
        let recycler = Recycler::new();
        for size in [MIN_BLOCK, MIN_BLOCK + 1, 100_000, 131_071, 131_072, 5_000_000] {
            // SAFETY: the blocks hold `size` bytes, and each is freed with its layout.
            unsafe {
                let a = recycler.alloc(layout(size));
                a.write_bytes(7, size);
                recycler.dealloc(a, layout(size));
                let before = recycler.system_allocations();
                let b = recycler.alloc_zeroed(layout(size));
                assert_eq!((a, before), (b, recycler.system_allocations()), "{size} bytes");
                assert!((0..size).all(|i| *b.add(i) == 0));
                recycler.dealloc(b, layout(size));
            }
        }
    }

    #[test]
    fn realloc_keeps_content_and_blocks_are_large_enough() {
        let recycler = Recycler::new();
        // SAFETY: the block holds `size` bytes, and is freed with its last layout.
        unsafe {
            let mut block = recycler.alloc(layout(1000));
            for i in 0..1000 {
                *block.add(i) = i as u8;
            }
            let mut size = 1000;
            for next in [70_000, 70_001, 300_000, 2_000, 90_000] {
                block = recycler.realloc(block, layout(size), next);
                size = next;
                block.add(1000).write_bytes(9, size - 1000);
                assert!((0..1000).all(|i| *block.add(i) == i as u8), "{next} bytes");
            }
            recycler.dealloc(block, layout(size));
        }
        for size in (MIN_BLOCK..MIN_BLOCK * 9).step_by(997) {
            let (_, whole) = recycler.pool(layout(size)).unwrap();
            assert!(whole.size() >= size && whole.size() <= size + size / 8 + 1, "{size}");
        }
    }
}
