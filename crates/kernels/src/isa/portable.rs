//! No instruction set in particular: arrays of four, which compilers turn into what the target has.

super::isa!("portable", Portable, pixels 4, rows 4,);

super::halves!("portable with bf16", Portable, Pairs, pixels 4, rows 4,);

#[derive(Clone, Copy)]
struct Portable;

/// Two products a lane, each an f32.
#[derive(Clone, Copy)]
struct Pairs;

// SAFETY of all: four pairs, or one, lie there by the trait's contract.
impl Product for Pairs {
    type Sum = Portable;
    type Factor = Bf16;
    type Register = [[Bf16; 2]; 4];

    #[inline(always)]
    unsafe fn spread(from: *const Bf16) -> [[Bf16; 2]; 4] {
        unsafe { [from.cast::<[Bf16; 2]>().read_unaligned(); 4] }
    }

    #[inline(always)]
    unsafe fn factors(from: *const Bf16) -> [[Bf16; 2]; 4] {
        unsafe { from.cast::<[[Bf16; 2]; 4]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn dot(a: [[Bf16; 2]; 4], b: [[Bf16; 2]; 4], sum: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i][0].wide() * b[i][0].wide() + a[i][1].wide() * b[i][1].wide() + sum[i])
    }
}

// SAFETY of all: four values, or pairs, lie there by the trait's contract.
impl Round for Portable {
    #[inline(always)]
    unsafe fn half(to: *mut Bf16, value: [f32; 4]) {
        unsafe { to.cast::<[Bf16; 4]>().write(value.map(Bf16::round)) }
    }

    #[inline(always)]
    unsafe fn first(to: *mut Bf16, value: [f32; 4]) {
        unsafe { to.cast::<[[Bf16; 2]; 4]>().write(value.map(|v| [Bf16::round(v), Bf16::default()])) }
    }

    #[inline(always)]
    unsafe fn second(to: *mut Bf16, value: [f32; 4]) {
        for (i, v) in value.into_iter().enumerate() {
            unsafe { *to.add(2 * i + 1) = Bf16::round(v) }
        }
    }
}

impl Simd for Portable {
    type V = [f32; 4];
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 4] {
        [value; 4]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 4] {
        // SAFETY: four values lie there by the trait's contract.
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: [f32; 4]) {
        // SAFETY: as for `load`.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(value) }
    }

    #[inline(always)]
    unsafe fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    unsafe fn sub(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    unsafe fn mul(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn fma(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
}
