//! Products with weights.

use keye_backend::matmul::Old;
use keye_backend::training::{Device, Precision, View, ViewMut};

use super::Result;
use crate::params::{Gradients, Params, Slot};

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
    pub(crate) fn forward<D: Device>(&self, device: &D, params: &Params<D::Array>, x: &D::Array) -> Result<D::Array> {
        let n = device.len(x) / self.inputs();
        let (mut y, old) = match self.bias {
            Some(bias) => (device.repeat(params.get(bias), n)?, Old::Keep),
            None => (device.zeros(n * self.outputs())?, Old::Replace),
        };
        self.add_product(device, params, x, &mut y, old)?;
        Ok(y)
    }

    /// `y += x W^T + b`
    pub(crate) fn add_forward<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        x: &D::Array,
        y: &mut D::Array,
    ) -> Result<()> {
        if let Some(bias) = self.bias {
            device.add_row(y, params.get(bias))?;
        }
        self.add_product(device, params, x, y, Old::Keep)
    }

    fn add_product<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        x: &D::Array,
        y: &mut D::Array,
        old: Old,
    ) -> Result<()> {
        let n = device.len(x) / self.inputs();
        let (x, y) = (View::of(x, n, self.inputs()), ViewMut::of(y, n, self.outputs()));
        device.product(self.precision, x.plain(), params.get(self.weight).t(), y, old)
    }

    /// Adds `dy^T x` and the column sums of dy to the gradients of what is trained.
    pub(crate) fn backward_params<D: Device>(
        &self,
        device: &D,
        gradients: &mut Gradients<D::Array>,
        x: &D::Array,
        dy: &D::Array,
    ) -> Result<()> {
        let n = device.len(x) / self.inputs();
        if let Some(dw) = gradients.get_mut(self.weight) {
            let (dy, x) = (View::of(dy, n, self.outputs()), View::of(x, n, self.inputs()));
            device.product(self.precision, dy.t(), x.plain(), dw, Old::Keep)?;
        }
        match self.bias.and_then(|bias| gradients.get_mut(bias)) {
            Some(db) => device.add_column_sums(dy, db),
            None => Ok(()),
        }
    }

    /// `dx (+)= dy W`
    pub(crate) fn backward_input<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        dy: &D::Array,
        dx: &mut D::Array,
        old: Old,
    ) -> Result<()> {
        let n = device.len(dy) / self.outputs();
        let (dy, dx) = (View::of(dy, n, self.outputs()), ViewMut::of(dx, n, self.inputs()));
        device.product(self.precision, dy.plain(), params.get(self.weight).plain(), dx, old)
    }

    /// `dy W`, `[n, in]`.
    pub(crate) fn input_gradient<D: Device>(
        &self,
        device: &D,
        params: &Params<D::Array>,
        dy: &D::Array,
    ) -> Result<D::Array> {
        let mut dx = device.zeros(device.len(dy) / self.outputs() * self.inputs())?;
        self.backward_input(device, params, dy, &mut dx, Old::Replace)?;
        Ok(dx)
    }
}
