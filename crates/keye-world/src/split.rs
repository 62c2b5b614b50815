//! What is trained on and what is tested on.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Colour, Motion, Shape};

/// A part of the world with seeds of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Split {
    /// For training.
    Train,
    /// For choosing between trained models.
    Validation,
    /// For reporting: every clip shows a combination that the other splits never show.
    Test,
}

impl Split {
    /// Its name in records and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
        }
    }

    /// Whether its clips may show a thing that does this.
    pub(crate) fn allows(self, colour: Colour, shape: Shape, motion: Motion) -> bool {
        self == Self::Test || !is_held_out(colour, shape, motion)
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Split {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Train, Self::Validation, Self::Test];
        let found = all.into_iter().find(|split| split.name() == text);
        found.ok_or_else(|| format!("expected train, validation or test, found {text:?}"))
    }
}

/// Whether a combination is kept for [`Split::Test`]: one colour of the eight for each shape and motion, and at most one
/// motion of the six for each colour and shape, and one shape for each colour and motion.
pub fn is_held_out(colour: Colour, shape: Shape, motion: Motion) -> bool {
    (colour as u32 + 3 * shape as u32 + 5 * motion as u32) % 8 == 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_out_combinations_leave_every_pair_in_training() {
        let mut held_out = 0;
        for &colour in Colour::ALL {
            for &shape in Shape::ALL {
                let motions = Motion::ALL.iter().filter(|motion| is_held_out(colour, shape, **motion)).count();
                assert!(motions <= 1, "{colour:?} {shape:?}");
                held_out += motions;
            }
            for &motion in Motion::ALL {
                assert!(Shape::ALL.iter().filter(|shape| is_held_out(colour, **shape, motion)).count() <= 1);
            }
        }
        assert_eq!(held_out, Shape::ALL.len() * Motion::ALL.len());
        for &shape in Shape::ALL {
            for &motion in Motion::ALL {
                assert_eq!(Colour::ALL.iter().filter(|colour| is_held_out(**colour, shape, motion)).count(), 1);
            }
        }
    }

    #[test]
    fn splits_are_read_by_their_names() {
        for split in [Split::Train, Split::Validation, Split::Test] {
            assert_eq!(split.to_string().parse(), Ok(split));
        }
        assert!("dev".parse::<Split>().is_err());
    }
}
