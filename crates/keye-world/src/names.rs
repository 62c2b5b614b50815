//! What things can be, and the words for it.

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$item_doc:meta])* $item:ident = $word:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$item_doc])* #[doc = $word] $item),* }

        impl $name {
            /// All of them, in order.
            pub const ALL: &'static [Self] = &[$(Self::$item),*];

            /// The word used in texts.
            pub fn word(self) -> &'static str {
                match self { $(Self::$item => $word),* }
            }
        }
    };
}

words! {
    /// Colours of things; none is a colour of backgrounds or letters.
    Colour {
        Red = "red", Green = "green", Blue = "blue", Yellow = "yellow",
        Orange = "orange", Purple = "purple", Cyan = "cyan", Pink = "pink",
    }
}

words! {
    /// Outlines of things.
    Shape {
        Circle = "circle", Square = "square", Triangle = "triangle",
        Diamond = "diamond", Cross = "cross", Ring = "ring",
    }
}

words! {
    /// Sizes of things.
    Size { Small = "small", Large = "large" }
}

words! {
    /// What a thing does while it moves.
    Motion {
        Still = "still", Left = "left", Right = "right", Up = "up", Down = "down", Circling = "in a circle",
    }
}

words! {
    /// Thirds of the picture.
    Place {
        TopLeft = "top left", Top = "top", TopRight = "top right",
        Left = "left", Center = "center", Right = "right",
        BottomLeft = "bottom left", Bottom = "bottom", BottomRight = "bottom right",
    }
}

words! {
    /// Colours behind things.
    Background { Black = "black", Grey = "grey", White = "white" }
}

impl Colour {
    /// sRGB.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::Red => [220, 36, 36],
            Self::Green => [36, 176, 56],
            Self::Blue => [44, 76, 232],
            Self::Yellow => [244, 224, 44],
            Self::Orange => [250, 136, 24],
            Self::Purple => [140, 44, 190],
            Self::Cyan => [60, 212, 224],
            Self::Pink => [252, 140, 200],
        }
    }
}

impl Shape {
    /// More than one.
    pub fn plural(self) -> &'static str {
        match self {
            Self::Circle => "circles",
            Self::Square => "squares",
            Self::Triangle => "triangles",
            Self::Diamond => "diamonds",
            Self::Cross => "crosses",
            Self::Ring => "rings",
        }
    }
}

impl Motion {
    /// Direction in whole steps, x to the right and y down; nothing for motions without one.
    pub fn direction(self) -> [i32; 2] {
        match self {
            Self::Left => [-1, 0],
            Self::Right => [1, 0],
            Self::Up => [0, -1],
            Self::Down => [0, 1],
            Self::Still | Self::Circling => [0, 0],
        }
    }

    /// The other way; itself when it has none.
    pub fn reversed(self) -> Self {
        match self {
            Self::Left => Self::Right,
            Self::Right => Self::Left,
            Self::Up => Self::Down,
            Self::Down => Self::Up,
            other => other,
        }
    }
}

impl Place {
    /// Column and row, 0 to 2.
    pub fn cell(self) -> [u32; 2] {
        let index = self as u32;
        [index % 3, index / 3]
    }

    /// The third of a picture of `size` (width, height) that holds a point.
    pub fn of(point: [i32; 2], size: [i32; 2]) -> Self {
        let third = |axis: usize| (point[axis] * 3 / size[axis]).clamp(0, 2) as usize;
        Self::ALL[third(1) * 3 + third(0)]
    }
}

impl Background {
    /// sRGB.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::Black => [18; 3],
            Self::Grey => [104; 3],
            Self::White => [238; 3],
        }
    }

    /// Colour of letters on it.
    pub fn ink(self) -> [u8; 3] {
        match self {
            Self::Black | Self::Grey => [255; 3],
            Self::White => [0; 3],
        }
    }
}
