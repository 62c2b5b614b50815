//! `y = x W^T + b`

use keye_backend::Isa;
use keye_backend::matmul::{Matrix, Old, par_matmul, par_matmul_bf16};
use serde::{Deserialize, Serialize};

use super::rows;
use crate::params::{Gradients, Params, Slot};

/// What the operands of products with weights are rounded to; sums, parameters and all else stay f32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Not at all.
    #[default]
    F32,
    /// Mixed precision; twice as fast where the machine multiplies pairs of bf16.
    Bf16,
}

impl Precision {
    /// `c (+)= a b`
    pub(crate) fn product(self, isa: Isa, a: Matrix<'_>, b: Matrix<'_>, c: &mut [f32], old: Old) {
        match self {
            Self::F32 => par_matmul(isa, a, b, c, old),
            Self::Bf16 => par_matmul_bf16(isa, a, b, c, old),
        }
    }
}

/// A layer's weight `[out, in]` and bias `[out]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Linear {
    pub(crate) weight: Slot,
    pub(crate) bias: Option<Slot>,
    pub(crate) precision: Precision,
}

impl Linear {
    pub(crate) fn inputs(&self) -> usize {
        self.weight.cols
    }

    pub(crate) fn outputs(&self) -> usize {
        self.weight.rows
    }

    /// `[n, in]` to `[n, out]`.
    pub(crate) fn forward(&self, isa: Isa, params: &Params, x: &[f32]) -> Vec<f32> {
        let n = x.len() / self.inputs();
        let mut y = match self.bias {
            Some(bias) => params.get(bias).repeat(n),
            None => vec![0.0; n * self.outputs()],
        };
        self.add_product(isa, params, x, &mut y, if self.bias.is_some() { Old::Keep } else { Old::Replace });
        y
    }

    /// `y += x W^T + b`
    pub(crate) fn add_forward(&self, isa: Isa, params: &Params, x: &[f32], y: &mut [f32]) {
        if let Some(bias) = self.bias {
            let bias = params.get(bias);
            rows::each_row(y, bias.len(), |_, y| super::kernels::add(isa, y, bias));
        }
        self.add_product(isa, params, x, y, Old::Keep);
    }

    fn add_product(&self, isa: Isa, params: &Params, x: &[f32], y: &mut [f32], old: Old) {
        let n = x.len() / self.inputs();
        let x = Matrix::new(x, n, self.inputs());
        self.precision.product(isa, x, Matrix::new(params.get(self.weight), self.outputs(), self.inputs()).t(), y, old);
    }

    /// Adds `dy^T x` and the column sums of dy to the gradients of what is trained.
    pub(crate) fn backward_params(&self, isa: Isa, gradients: &mut Gradients, x: &[f32], dy: &[f32]) {
        let n = x.len() / self.inputs();
        if let Some(dw) = gradients.get_mut(self.weight) {
            let dy = Matrix::new(dy, n, self.outputs()).t();
            self.precision.product(isa, dy, Matrix::new(x, n, self.inputs()), dw, Old::Keep);
        }
        if let Some(db) = self.bias.and_then(|bias| gradients.get_mut(bias)) {
            rows::add_column_sums(isa, dy, db);
        }
    }

    /// `dx (+)= dy W`
    pub(crate) fn backward_input(&self, isa: Isa, params: &Params, dy: &[f32], dx: &mut [f32], old: Old) {
        let n = dy.len() / self.outputs();
        let w = Matrix::new(params.get(self.weight), self.outputs(), self.inputs());
        self.precision.product(isa, Matrix::new(dy, n, self.outputs()), w, dx, old);
    }
}
