//! The kernels' sources. Each module is the common part followed by its own file: no include paths, no headers.

/// Kernels that are compiled together.
#[derive(Debug, Clone, Copy)]
pub struct Module {
    /// The file's name without its extension.
    pub name: &'static str,
    parts: [&'static str; 2],
}

const COMMON: &str = include_str!("kernels/common.cuh");

/// All modules.
pub const MODULES: [Module; 10] = [
    Module { name: "rows", parts: [COMMON, include_str!("kernels/rows.cu")] },
    Module { name: "product", parts: [COMMON, include_str!("kernels/product.cu")] },
    Module { name: "packed", parts: [COMMON, include_str!("kernels/packed.cu")] },
    Module { name: "attention", parts: [COMMON, include_str!("kernels/attention.cu")] },
    Module { name: "select", parts: [COMMON, include_str!("kernels/select.cu")] },
    Module { name: "experts", parts: [COMMON, include_str!("kernels/experts.cu")] },
    Module { name: "train_rows", parts: [COMMON, include_str!("kernels/train_rows.cu")] },
    Module { name: "train_step", parts: [COMMON, include_str!("kernels/train_step.cu")] },
    Module { name: "train_product", parts: [COMMON, include_str!("kernels/train_product.cu")] },
    Module { name: "train_attention", parts: [COMMON, include_str!("kernels/train_attention.cu")] },
];

impl Module {
    /// The whole source.
    pub fn source(&self) -> String {
        format!("{}\n#line 1 \"{}.cu\"\n{}", self.parts[0], self.name, self.parts[1])
    }

    /// Whether only training uses it.
    pub fn is_of_training(&self) -> bool {
        self.name.starts_with("train_")
    }

    /// Names of its kernels and the threads of their blocks: what stands in and behind `KERNEL(threads)`.
    pub fn kernels(&self) -> Vec<(&'static str, u32)> {
        let name = |text: &'static str| {
            let (threads, text) = text.split_once(')')?;
            let text = text.trim_start();
            Some((&text[..text.find('(')?], threads.parse().ok()?))
        };
        self.parts[1].split("KERNEL(").skip(1).filter_map(name).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_have_one_name_each() {
        let mut names: Vec<_> = MODULES.iter().flat_map(Module::kernels).map(|(name, _)| name).collect();
        assert!(names.len() > 40 && names.contains(&"product_bf16_few") && names.contains(&"attend_rows_80_bf16"));
        assert!(names.iter().all(|name| name.bytes().all(|b| b == b'_' || b.is_ascii_alphanumeric())));
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
        // They are not loaded with the others.
        let of_training = MODULES.iter().filter(|module| module.is_of_training());
        assert!(of_training.flat_map(Module::kernels).all(|(name, _)| name.starts_with("train_")));
    }
}
