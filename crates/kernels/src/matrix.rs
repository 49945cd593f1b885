//! Products of matrices that lie in slices, on the calling thread.

/// A matrix in a slice: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row after row.
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(data.len(), rows * cols, "a matrix fills its slice");
        Matrix { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Rows as columns; nothing moves.
    pub fn transposed(self) -> Self {
        Matrix { rows: self.cols, cols: self.rows, row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }
}

/// `c = a · b`, or `c += a · b`. `c`: `[a.rows, b.cols]`, row after row.
pub fn multiply(c: &mut [f32], a: Matrix, b: Matrix, add: bool) {
    assert_eq!(a.cols, b.rows, "inner lengths agree");
    assert_eq!(c.len(), a.rows * b.cols, "the product fills its slice");
    if c.is_empty() || a.cols == 0 {
        if !add {
            c.fill(0.0);
        }
        return;
    }
    // SAFETY: `Matrix::new` and the assertions above make every element of the three matrices lie in its slice; strides are theirs.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            c.as_mut_ptr(),
            1,
            b.cols as isize,
            add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
