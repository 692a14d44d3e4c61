//! Structs that Rust writes and kernels read, declared once, here in Rust.
//!
//! `shared_struct!` declares a struct with the C++ type of each field; a test writes all of them to
//! `kernels/generated/shared.cuh`, with assertions of their sizes and offsets, and fails where that
//! file is stale. See `generated.rs`.

/// A struct that kernels read: `struct Name = "CppName" { field: type = "C++ type", .. }`. The C++
/// type may be left out where it follows: of numbers, arrays of numbers and other shared structs.
/// The doc comments go to both languages. All of the backend sees the struct.
macro_rules! shared_struct {
    (
        $(#[doc = $doc:literal])*
        struct $name:ident = $cpp:literal {
            $( $(#[doc = $field_doc:literal])*
            $field_vis:vis $field:ident: $type:ty $(= $field_cpp:literal)?, )*
        }
    ) => {
        $(#[doc = $doc])*
        #[repr(C)]
        #[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
        pub(in crate::backend::cuda) struct $name {
            $( $(#[doc = $field_doc])* $field_vis $field: $type, )*
        }

        #[cfg(test)]
        impl $crate::backend::cuda::shared::Shared for $name {
            fn declaration() -> $crate::backend::cuda::shared::Declaration {
                use $crate::backend::cuda::shared::{Declaration, Field};
                Declaration {
                    name: $cpp,
                    docs: &[$($doc),*],
                    bytes: size_of::<$name>(),
                    fields: vec![$(Field {
                        name: stringify!($field),
                        docs: &[$($field_doc),*],
                        cpp: shared_struct!(@cpp $type $(, $field_cpp)?),
                        offset: std::mem::offset_of!($name, $field),
                    }),*],
                }
            }
        }

        #[cfg(test)]
        impl $crate::backend::cuda::shared::InCpp for $name {
            fn in_cpp() -> (String, usize) {
                ($cpp.into(), 0)
            }
        }
    };
    (@cpp $type:ty, $cpp:literal) => { ($cpp.to_string(), 0) };
    (@cpp $type:ty) => { <$type as $crate::backend::cuda::shared::InCpp>::in_cpp() };
}
pub(super) use shared_struct;

/// A shared struct, for the header.
#[cfg(test)]
pub(super) trait Shared {
    fn declaration() -> Declaration;
}

/// A type that C++ has as well: its name, and its length if it is an array.
#[cfg(test)]
pub(super) trait InCpp {
    fn in_cpp() -> (String, usize);
}

#[cfg(test)]
pub(super) struct Declaration {
    /// With its namespace.
    pub name: &'static str,
    pub docs: &'static [&'static str],
    pub bytes: usize,
    pub fields: Vec<Field>,
}

#[cfg(test)]
pub(super) struct Field {
    pub name: &'static str,
    pub docs: &'static [&'static str],
    /// The type, and the length of an array or zero.
    pub cpp: (String, usize),
    pub offset: usize,
}

#[cfg(test)]
impl Declaration {
    /// The declaration in C++.
    pub fn in_cpp(&self) -> String {
        let (namespace, name) = match self.name.rsplit_once("::") {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, self.name),
        };
        let mut text = String::new();
        if let Some(namespace) = namespace {
            text += &format!("namespace {namespace} {{\n");
        }
        let comment = |docs: &[&str], indent: &str| -> String {
            docs.iter().map(|doc| format!("{indent}//{doc}\n")).collect()
        };
        text += &comment(self.docs, "");
        text += &format!("struct {name} {{\n");
        for field in &self.fields {
            text += &comment(field.docs, "  ");
            let length = match field.cpp.1 {
                0 => String::new(),
                length => format!("[{length}]"),
            };
            text += &format!("  {} {}{length};\n", field.cpp.0, field.name);
        }
        text += "};\n";
        text += &format!("static_assert(sizeof({name}) == {});\n", self.bytes);
        for field in &self.fields {
            let (field, offset) = (field.name, field.offset);
            text += &format!("static_assert(offsetof({name}, {field}) == {offset});\n");
        }
        if let Some(namespace) = namespace {
            text += &format!("}}  // namespace {namespace}\n");
        }
        text
    }
}

#[cfg(test)]
mod in_cpp {
    use super::InCpp;

    macro_rules! in_cpp {
        ($($type:ty = $cpp:literal),*) => {
            $(impl InCpp for $type {
                fn in_cpp() -> (String, usize) {
                    ($cpp.into(), 0)
                }
            })*
        };
    }
    in_cpp!(u32 = "uint32_t", u64 = "uint64_t", f32 = "float");

    impl<const N: usize> InCpp for [u32; N] {
        fn in_cpp() -> (String, usize) {
            ("uint32_t".into(), N)
        }
    }
}
