//! Shapes of convolutions.

/// Shape of a convolution: input `[n, h, w, c_in]`, weight `[c_out, c_in, kernel, kernel]`, output
/// `[n, h_out, w_out, c_out]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Number of images.
    pub n: usize,
    /// Input rows.
    pub h: usize,
    /// Input columns.
    pub w: usize,
    /// Input channels.
    pub c_in: usize,
    /// Output channels.
    pub c_out: usize,
    /// Side of the kernel.
    pub kernel: usize,
    /// Distance between the windows of neighboring output pixels, in both directions.
    pub stride: usize,
    /// Zeros on every side of the input.
    pub padding: usize,
    /// Distance between neighboring taps, in both directions.
    pub dilation: usize,
}

impl Shape {
    /// Side of a window.
    fn window(&self) -> usize {
        self.dilation * (self.kernel - 1) + 1
    }

    /// Rows of the output.
    pub fn h_out(&self) -> usize {
        (self.h + 2 * self.padding - self.window()) / self.stride + 1
    }

    /// Columns of the output.
    pub fn w_out(&self) -> usize {
        (self.w + 2 * self.padding - self.window()) / self.stride + 1
    }

    /// Number of values in the input, the weight and the output.
    pub fn lengths(&self) -> [usize; 3] {
        let pixels_out = self.n * self.h_out() * self.w_out();
        let weight = self.c_out * self.c_in * self.kernel * self.kernel;
        [self.n * self.h * self.w * self.c_in, weight, pixels_out * self.c_out]
    }

    /// Number of multiply-adds of the forward pass, and of each gradient.
    pub fn multiply_adds(&self) -> usize {
        self.n * self.h_out() * self.w_out() * self.c_out * self.c_in * self.kernel * self.kernel
    }

    /// Panics if no window fits into the padded input.
    pub(super) fn check(&self) {
        assert!(self.kernel > 0 && self.stride > 0 && self.dilation > 0, "{self:?}");
        assert!(self.h + 2 * self.padding >= self.window() && self.w + 2 * self.padding >= self.window(), "{self:?}");
    }

    /// Input map.
    pub(super) fn input_map(&self) -> MapShape {
        MapShape { h: self.h, w: self.w, c: self.c_in }
    }

    /// Output map.
    pub(super) fn output_map(&self) -> MapShape {
        MapShape { h: self.h_out(), w: self.w_out(), c: self.c_out }
    }
}

/// Shape of the map of one image, `[h, w, c]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct MapShape {
    pub h: usize,
    pub w: usize,
    pub c: usize,
}

impl MapShape {
    /// Number of values.
    pub fn len(self) -> usize {
        self.h * self.w * self.c
    }
}
