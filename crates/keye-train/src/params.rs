//! Parameters, one flat row of f32 with a table of names.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use keye_backend::BackendError;
use keye_backend::training::{Device, View, ViewMut};
use keye_model::TensorShape;

use crate::TrainError;

/// A tensor's place: its number in the table, where it begins, and its shape as rows and columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    pub(crate) tensor: usize,
    start: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl Slot {
    pub(crate) fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Some rows of a matrix.
    pub(crate) fn part(&self, first: usize, rows: usize) -> Self {
        assert!(first + rows <= self.rows, "rows of a tensor");
        Self { start: self.start + first * self.cols, rows, ..*self }
    }

    /// Some elements of a vector.
    pub(crate) fn columns(&self, first: usize, cols: usize) -> Self {
        assert!(self.rows == 1 && first + cols <= self.cols, "elements of a vector");
        Self { start: self.start + first, cols, ..*self }
    }
}

/// Names, shapes and places of a model's tensors.
#[derive(Debug, PartialEq, Eq)]
pub struct Layout {
    tensors: Vec<TensorShape>,
    starts: Vec<usize>,
    by_name: BTreeMap<String, usize>,
    len: usize,
}

impl Layout {
    /// One tensor after the other.
    pub fn new(tensors: Vec<TensorShape>) -> Self {
        let mut len = 0;
        let starts = tensors
            .iter()
            .map(|tensor| {
                let start = len;
                len += tensor.shape.iter().product::<usize>();
                start
            })
            .collect();
        let by_name = tensors.iter().enumerate().map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        Self { tensors, starts, by_name, len }
    }

    /// The tensors, in order.
    pub fn tensors(&self) -> &[TensorShape] {
        &self.tensors
    }

    /// Number of parameters.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without parameters.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where tensor number `i` lies.
    pub fn range(&self, i: usize) -> Range<usize> {
        self.starts[i]..self.starts.get(i + 1).copied().unwrap_or(self.len)
    }

    /// The number of a tensor.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// A tensor that the model's own table lists.
    pub(crate) fn slot(&self, name: &str) -> Result<Slot, TrainError> {
        let tensor = self.find(name).ok_or_else(|| TrainError::Model(format!("no tensor {name} in the layout")))?;
        let shape = &self.tensors[tensor].shape;
        let (rows, cols) = match shape.len() {
            0 | 1 => (1, shape.iter().product()),
            _ => (shape[0], shape[1..].iter().product()),
        };
        Ok(Slot { tensor, start: self.starts[tensor], rows, cols })
    }
}

/// Values of all tensors, on a device or (without one) on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Params<A = Vec<f32>> {
    /// What lies where.
    pub layout: Arc<Layout>,
    /// `[layout.len()]`
    pub values: A,
}

impl<A> Params<A> {
    /// From a device.
    pub(crate) fn onto_host<D: Device<Array = A>>(&self, device: &D) -> Result<Params, BackendError> {
        let values = device.values(View::of(&self.values, 1, self.layout.len()))?.into_owned();
        Ok(Params { layout: self.layout.clone(), values })
    }

    pub(crate) fn get(&self, slot: Slot) -> View<'_, A> {
        View { array: &self.values, start: slot.start, rows: slot.rows, cols: slot.cols }
    }
}

impl Params {
    /// All zero.
    pub fn zeros(layout: Arc<Layout>) -> Self {
        let values = vec![0.0; layout.len()];
        Self { layout, values }
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&[f32]> {
        self.layout.find(name).map(|i| &self.values[self.layout.range(i)])
    }

    /// A tensor by name.
    pub fn tensor_mut(&mut self, name: &str) -> Option<&mut [f32]> {
        let i = self.layout.find(name)?;
        let range = self.layout.range(i);
        Some(&mut self.values[range])
    }

    /// To a device.
    pub fn onto<D: Device>(self, device: &D) -> Result<Params<D::Array>, BackendError> {
        Ok(Params { values: device.array(self.values)?, layout: self.layout })
    }
}

/// Sums of gradients, kept for the tensors that are trained.
#[derive(Debug, Clone)]
pub struct Gradients<A = Vec<f32>> {
    /// Shaped like the parameters; zero where nothing is trained.
    pub values: A,
    layout: Arc<Layout>,
    trained: Vec<bool>,
}

impl<A> Gradients<A> {
    /// Zeros on a device; `trained` has a flag per tensor.
    pub fn zeros<D: Device<Array = A>>(
        device: &D,
        layout: &Arc<Layout>,
        trained: Vec<bool>,
    ) -> Result<Self, BackendError> {
        assert_eq!(trained.len(), layout.tensors.len(), "one flag per tensor");
        Ok(Self { values: device.zeros(layout.len())?, layout: layout.clone(), trained })
    }

    /// Zeros for the same tensors.
    pub(crate) fn alike<D: Device<Array = A>>(&self, device: &D) -> Result<Self, BackendError> {
        Self::zeros(device, &self.layout, self.trained.clone())
    }

    /// Whether a tensor is trained.
    pub fn trained(&self) -> &[bool] {
        &self.trained
    }

    /// All of them, as one row.
    pub(crate) fn view(&self) -> View<'_, A> {
        View::of(&self.values, 1, self.layout.len())
    }

    /// Adds those of the same tensors.
    pub fn add<D: Device<Array = A>>(&mut self, device: &D, other: &Self) -> Result<(), BackendError> {
        device.combine(1.0, ViewMut::of(&mut self.values, 1, self.layout.len()), 1.0, other.view())
    }

    /// The sums of a tensor; `None` where it is frozen.
    pub(crate) fn get_mut(&mut self, slot: Slot) -> Option<ViewMut<'_, A>> {
        let Slot { start, rows, cols, .. } = slot;
        self.trained[slot.tensor].then_some(ViewMut { array: &mut self.values, start, rows, cols })
    }
}
