//! The source read as code: modules, what each file imports, how long functions are.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below a folder with one of these extensions, by its path from the root of the
/// repository, with its text.
pub fn files(folder: &str, extensions: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder of the repository") {
            let path = entry.expect("a readable folder").path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            if path.is_dir() {
                folders.push(path);
            } else if extension.is_some_and(|extension| extensions.contains(&extension)) {
                let text = std::fs::read_to_string(&path).expect("a readable file");
                let name = path.strip_prefix(root()).expect("below the root");
                found.push((name.to_string_lossy().replace('\\', "/"), text));
            }
        }
    }
    assert!(!found.is_empty(), "{folder} holds no such files");
    found.sort();
    found
}

/// Every Rust file below a folder, by its path from the root of the repository, with its text.
pub fn sources(folder: &str) -> Vec<(String, String)> {
    files(folder, &["rs"])
}

/// The module of a file below `src`, as the names from the root of its crate.
pub fn module_of(file: &str) -> Vec<String> {
    let path = file.trim_start_matches("src/").trim_end_matches(".rs");
    let path = path.strip_suffix("/mod").unwrap_or(path);
    match path {
        "lib" | "main" => Vec::new(),
        path => path.split('/').map(str::to_string).collect(),
    }
}

/// One import or mention of a path: its names, from the module in which it stands.
struct Mention {
    module: Vec<String>,
    names: Vec<String>,
}

/// A name that a module passes on with `use`.
struct Alias {
    name: String,
    target: Mention,
}

/// A file of the library as code.
pub struct SourceFile {
    pub path: String,
    pub module: Vec<String>,
    /// Modules that stand inside the file, its own included.
    inner_modules: BTreeSet<Vec<String>>,
    aliases: BTreeMap<Vec<String>, Vec<Alias>>,
    globs: BTreeMap<Vec<String>, Vec<Mention>>,
    mentions: Vec<Mention>,
    pub functions: Vec<Function>,
}

/// A function with a body.
pub struct Function {
    pub name: String,
    pub first_line: usize,
    pub num_lines: usize,
}

fn is_test_only(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let syn::Meta::List(list) = &attribute.meta else { return false };
        list.path.is_ident("cfg") && list.tokens.to_string() == "test"
    })
}

struct Reader {
    file: SourceFile,
    module: Vec<String>,
}

impl Reader {
    fn mention(&self, names: Vec<String>) -> Mention {
        Mention { module: self.module.clone(), names }
    }

    /// Opens the braces of a `use` tree.
    fn open(&mut self, tree: &syn::UseTree, mut before: Vec<String>) {
        match tree {
            syn::UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.open(&path.tree, before);
            }
            syn::UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.open(tree, before.clone()));
            }
            syn::UseTree::Glob(_) => {
                let glob = self.mention(before.clone());
                self.file.globs.entry(self.module.clone()).or_default().push(glob);
                self.file.mentions.push(self.mention(before));
            }
            syn::UseTree::Name(syn::UseName { ident }) => {
                let name = ident.to_string();
                self.named(before, &name, &name);
            }
            syn::UseTree::Rename(syn::UseRename { ident, rename, .. }) => {
                self.named(before, &ident.to_string(), &rename.to_string());
            }
        }
    }

    fn named(&mut self, mut names: Vec<String>, name: &str, alias: &str) {
        let alias = match name {
            "self" => names.last().cloned().unwrap_or_default(),
            _ => {
                names.push(name.to_string());
                alias.to_string()
            }
        };
        let target = self.mention(names.clone());
        let aliases = self.file.aliases.entry(self.module.clone()).or_default();
        aliases.push(Alias { name: alias, target });
        self.file.mentions.push(self.mention(names));
    }

    /// A path in the tokens of a macro. A name alone is none, and `pub(super)` imports nothing.
    fn mention_token_path(&mut self, names: &mut Vec<String>) {
        let names = std::mem::take(names);
        if names.len() > 1 {
            self.file.mentions.push(self.mention(names));
        }
    }

    /// Paths in the tokens of a macro, which is not parsed.
    fn read_tokens(&mut self, tokens: proc_macro2::TokenStream) {
        let mut names: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                proc_macro2::TokenTree::Ident(ident) => {
                    if colons != 2 {
                        self.mention_token_path(&mut names);
                    }
                    names.push(ident.to_string());
                    colons = 0;
                }
                proc_macro2::TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                other => {
                    if let proc_macro2::TokenTree::Group(group) = other {
                        self.read_tokens(group.stream());
                    }
                    self.mention_token_path(&mut names);
                    colons = 0;
                }
            }
        }
        self.mention_token_path(&mut names);
    }

    fn function(&mut self, name: &syn::Ident, start: proc_macro2::Span, block: &syn::Block) {
        let (first, last) = (start.start().line, block.span().end().line);
        self.file.functions.push(Function {
            name: name.to_string(),
            first_line: first,
            num_lines: last - first + 1,
        });
    }
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if !is_test_only(&item.attrs) {
            self.open(&item.tree, Vec::new());
        }
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if is_test_only(&item.attrs) {
            return;
        }
        if item.content.is_some() {
            self.module.push(item.ident.to_string());
            self.file.inner_modules.insert(self.module.clone());
            visit::visit_item_mod(self, item);
            self.module.pop();
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        if !is_test_only(&item.attrs) {
            self.function(&item.sig.ident, item.sig.span(), &item.block);
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        if !is_test_only(&item.attrs) {
            self.function(&item.sig.ident, item.sig.span(), &item.block);
            visit::visit_impl_item_fn(self, item);
        }
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.function(&item.sig.ident, item.sig.span(), block);
        }
        visit::visit_trait_item_fn(self, item);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        if !is_test_only(&item.attrs) {
            visit::visit_item_impl(self, item);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.file.mentions.push(self.mention(names));
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, item: &'ast syn::Macro) {
        self.visit_path(&item.path);
        self.read_tokens(item.tokens.clone());
    }

    fn visit_visibility(&mut self, _: &'ast syn::Visibility) {} // `pub(super)` imports nothing

    fn visit_attribute(&mut self, _: &'ast syn::Attribute) {} // comments, derives
}

impl SourceFile {
    pub fn read(path: &str, text: &str) -> SourceFile {
        let code = syn::parse_file(text).unwrap_or_else(|error| panic!("{path}: {error}"));
        let module = module_of(path);
        let file = SourceFile {
            path: path.to_string(),
            module: module.clone(),
            inner_modules: BTreeSet::from([module.clone()]),
            aliases: BTreeMap::new(),
            globs: BTreeMap::new(),
            mentions: Vec::new(),
            functions: Vec::new(),
        };
        let mut reader = Reader { file, module };
        reader.visit_file(&code);
        reader.file
    }
}

/// The files of one crate, with the modules that they hold.
pub struct Library {
    pub files: Vec<SourceFile>,
    /// The file of each module.
    home: BTreeMap<Vec<String>, usize>,
}

impl Library {
    /// The files of the library, without those of the command line.
    pub fn read() -> Library {
        let texts = sources("src").into_iter();
        let texts =
            texts.filter(|(path, _)| !path.starts_with("src/cli/") && path != "src/main.rs");
        Library::of(texts.map(|(path, text)| SourceFile::read(&path, &text)).collect())
    }

    /// The files of the command line.
    pub fn read_cli() -> Library {
        let texts = sources("src").into_iter();
        let texts = texts.filter(|(path, _)| path.starts_with("src/cli/") || path == "src/main.rs");
        Library::of(texts.map(|(path, text)| SourceFile::read(&path, &text)).collect())
    }

    pub fn of(files: Vec<SourceFile>) -> Library {
        let mut home = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            for module in &file.inner_modules {
                assert_eq!(home.insert(module.clone(), index), None, "{module:?} is there twice");
            }
        }
        Library { files, home }
    }

    /// For each file, the files that it imports, with the full path of what it imports.
    pub fn imports(&self) -> Vec<BTreeMap<usize, String>> {
        let of = |(index, file): (usize, &SourceFile)| {
            let mut imports = BTreeMap::new();
            for mention in &file.mentions {
                for (module, rest) in self.resolve(mention, 0) {
                    let other = self.home[&module];
                    if other != index {
                        let path = [&module[..], &rest[..]].concat().join("::");
                        imports.entry(other).or_insert(path);
                    }
                }
            }
            imports
        };
        self.files.iter().enumerate().map(of).collect()
    }

    /// The modules that define what is mentioned, with the names that are left there. A name that a
    /// module passes on leads to the module that it comes from. Empty for other crates' paths.
    fn resolve(&self, mention: &Mention, hops: usize) -> Vec<(Vec<String>, Vec<String>)> {
        let Mention { module, names } = mention;
        let Some((first, rest)) = names.split_first() else { return Vec::new() };
        let mut at = module.clone();
        let mut rest = rest;
        match first.as_str() {
            "crate" => at.clear(),
            "self" => {}
            "super" => {
                at.pop();
                while let Some(("super", later)) = rest.split_first().map(|(n, l)| (n.as_str(), l))
                {
                    at.pop();
                    rest = later;
                }
            }
            // A name alone is in scope by an import, which is a mention of its own; a longer path
            // may begin with a child module or an imported one.
            _ if rest.is_empty() => return Vec::new(),
            _ => {
                let child = [&at[..], std::slice::from_ref(first)].concat();
                if !self.home.contains_key(&child) && self.alias(&at, first).is_none() {
                    return Vec::new();
                }
                rest = names;
            }
        }
        self.descend(at, rest, hops)
    }

    fn alias(&self, module: &[String], name: &str) -> Option<&Mention> {
        let file = &self.files[*self.home.get(module)?];
        let alias = file.aliases.get(module)?.iter().find(|alias| alias.name == name)?;
        Some(&alias.target)
    }

    /// Follows names from a module on, through child modules and names passed on.
    fn descend(
        &self,
        mut at: Vec<String>,
        mut names: &[String],
        hops: usize,
    ) -> Vec<(Vec<String>, Vec<String>)> {
        if !self.home.contains_key(&at) || hops > 16 {
            return Vec::new();
        }
        while let Some((name, rest)) = names.split_first() {
            let child = [&at[..], std::slice::from_ref(name)].concat();
            if self.home.contains_key(&child) {
                (at, names) = (child, rest);
                continue;
            }
            if let Some(target) = self.alias(&at, name) {
                let names = [&target.names[..], rest].concat();
                let onward = Mention { module: target.module.clone(), names };
                return self.resolve(&onward, hops + 1);
            }
            let file = &self.files[self.home[&at]];
            for glob in file.globs.get(&at).into_iter().flatten() {
                for (module, _) in self.resolve(glob, hops + 1) {
                    if module != at && self.alias(&module, name).is_some() {
                        return self.descend(module, names, hops + 1);
                    }
                }
            }
            break;
        }
        vec![(at, names.to_vec())]
    }

    /// The circles of files: each is a set of files of which every one reaches every other one by
    /// imports.
    pub fn circles(&self) -> BTreeSet<BTreeSet<String>> {
        let imports = self.imports();
        let reach: Vec<BTreeSet<usize>> = (0..imports.len())
            .map(|start| {
                let (mut seen, mut open) = (BTreeSet::new(), vec![start]);
                while let Some(file) = open.pop() {
                    open.extend(imports[file].keys().filter(|&&other| seen.insert(other)));
                }
                seen
            })
            .collect();
        let circle = |file: usize| -> BTreeSet<String> {
            let others = reach[file].iter().filter(|&&other| reach[other].contains(&file));
            others.map(|&other| self.files[other].path.clone()).collect()
        };
        let circles = (0..imports.len()).map(circle);
        circles.filter(|circle| circle.len() > 1).collect()
    }
}
