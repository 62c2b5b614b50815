//! Stories to pixels, in integers.

use crate::font;
use crate::story::{Story, UNIT};
use crate::{Look, Shape};

/// Draws a frame of a story: `[height, width, 3]`, RGB.
pub(crate) fn render(story: &Story, frame: u32) -> Vec<u8> {
    let background = story.scenes[story.scene_at(frame)].background;
    let (width, height) = (story.width as usize, story.height as usize);
    let mut rgb = background.rgb().repeat(width * height);
    for thing in &story.things {
        if let Some(look) = thing.at(frame) {
            draw(&mut rgb, [width, height], &look);
        }
    }
    if let Some(label) = story.label.as_ref().filter(|label| (label.from..label.until).contains(&frame)) {
        let ink = background.ink();
        for (i, character) in label.text.chars().enumerate() {
            let left = label.x + i as u32 * font::ADVANCE * label.scale;
            let rows = font::rows(character);
            for (y, x) in
                (0..font::HEIGHT * label.scale).flat_map(|y| (0..font::WIDTH * label.scale).map(move |x| (y, x)))
            {
                let dot = rows[(y / label.scale) as usize] >> (font::WIDTH - 1 - x / label.scale) & 1;
                let (x, y) = ((left + x) as usize, (label.y + y) as usize);
                if dot == 1 && x < width && y < height {
                    rgb[(y * width + x) * 3..][..3].copy_from_slice(&ink);
                }
            }
        }
    }
    rgb
}

fn draw(rgb: &mut [u8], [width, height]: [usize; 2], look: &Look) {
    let radius = look.size.radius() * UNIT;
    let colour = look.colour.rgb();
    let span = |centre: i32, limit: usize| {
        let pixel = |at: i32| at.div_euclid(UNIT).clamp(0, limit as i32) as usize;
        pixel(centre - radius)..pixel(centre + radius + UNIT)
    };
    for y in span(look.centre[1], height) {
        for x in span(look.centre[0], width) {
            let offset = |pixel: usize, centre: i32| pixel as i32 * UNIT + UNIT / 2 - centre;
            if covers(look.shape, radius, offset(x, look.centre[0]), offset(y, look.centre[1])) {
                rgb[(y * width + x) * 3..][..3].copy_from_slice(&colour);
            }
        }
    }
}

/// Whether a shape of radius `r` around the origin covers the point.
fn covers(shape: Shape, r: i32, x: i32, y: i32) -> bool {
    let (ax, ay) = (x.abs(), y.abs());
    let square = |n: i32| n * n;
    match shape {
        Shape::Circle => square(x) + square(y) <= square(r),
        Shape::Square => ax.max(ay) * 8 <= r * 7,
        Shape::Triangle => ay <= r && ax * 2 <= y + r,
        Shape::Diamond => ax + ay <= r,
        Shape::Cross => ax.max(ay) <= r && ax.min(ay) * 10 <= r * 3,
        Shape::Ring => square(x) + square(y) <= square(r) && square(x) + square(y) > square(r * 9 / 16),
    }
}
