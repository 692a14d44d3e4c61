//! Python's pickles, read as data.
//!
//! The machine knows the opcodes of protocols 0 to 5 (CPython's `pickletools.py`), and of all
//! classes only those that tensors are made of. Every other class is an [`Value::Opaque`] object,
//! whatever is done to it: nothing is imported and nothing is called.
//!
//! Values live in one arena and refer to each other by index, and texts are shared, so a pickle that
//! repeats a list a thousand times over costs a thousand indices. An opcode adds at most one value of
//! a fixed size; with the limits below, memory stays within a gigabyte whatever a pickle says.

use std::collections::HashMap;
use std::rc::Rc;

/// The most bytes of a pickle. That of a model of a hundred thousand tensors has about 20 million.
const MAX_LEN: usize = 64 << 20;
/// The most values of a pickle.
const MAX_VALUES: usize = 1 << 24;
/// The most dimensions of a tensor.
const MAX_RANK: usize = 16;
/// The most arguments of a call that anybody reads.
const MAX_ARGUMENTS: usize = 8;
/// The most bytes of the name of a class.
const MAX_NAME: usize = 512;

/// The index of a value.
pub(super) type Id = u32;

/// A value of a pickle.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Rc<str>),
    Bytes,
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A class or function by its full name, as `torch._utils._rebuild_tensor_v2`.
    Class(Rc<str>),
    /// A stretch of raw numbers in another file.
    Storage(Rc<Storage>),
    Tensor(Box<TensorValue>),
    /// An object of a class that is not known here: the class's name.
    Opaque(Rc<str>),
}

/// Raw numbers: `[len]`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Storage {
    /// The class, as `torch.FloatStorage`, which says the number type.
    pub class: Rc<str>,
    /// The name of the file that holds the numbers.
    pub key: Rc<str>,
    pub len: u64,
}

/// A view into a storage; offset and strides count numbers.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorValue {
    pub storage: Rc<Storage>,
    /// The number type where the storage does not say it, as `torch.float8_e4m3fn`.
    pub dtype: Option<Rc<str>>,
    pub offset: u64,
    pub shape: Vec<u64>,
    pub strides: Vec<u64>,
}

/// The values of a pickle.
pub(super) struct Pickle {
    values: Vec<Value>,
    root: Id,
}

impl Pickle {
    /// Reads the pickle at the start of `bytes`; or says what is wrong with it.
    pub fn read(bytes: &[u8]) -> Result<Pickle, String> {
        if bytes.len() > MAX_LEN {
            return Err(format!("it has {} bytes, at most {MAX_LEN} are read", bytes.len()));
        }
        let mut machine = Machine { bytes, at: 0, ..Machine::default() };
        loop {
            match machine.step() {
                Ok(true) => break,
                Ok(false) if machine.values.len() > MAX_VALUES => {
                    return Err(format!("it has more than {MAX_VALUES} values"));
                }
                Ok(false) => {}
                Err(reason) => return Err(format!("byte {}: {reason}", machine.at)),
            }
        }
        let root = machine.pop()?;
        Ok(Pickle { values: machine.values, root })
    }

    pub fn root(&self) -> &Value {
        &self.values[self.root as usize]
    }

    pub fn value(&self, id: Id) -> &Value {
        &self.values[id as usize]
    }
}

#[derive(Default)]
struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value>,
    stack: Vec<Id>,
    /// Lengths of the stack where marks were set.
    marks: Vec<usize>,
    memo: HashMap<u64, Id>,
}

type Done<T = ()> = Result<T, String>;

impl Machine<'_> {
    /// Executes an opcode; true for the last.
    // long: one line or two for each opcode.
    fn step(&mut self) -> Done<bool> {
        match self.byte()? {
            b'.' => return Ok(true),
            0x80 => drop(self.byte()?),    // PROTO
            0x95 => drop(self.number(8)?), // FRAME
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'J' => {
                let number = self.number(4)? as u32 as i32;
                self.push(Value::Int(number.into()));
            }
            b'K' => self.push_number(1)?,
            b'M' => self.push_number(2)?,
            0x8a => self.push_long(1)?,
            0x8b => self.push_long(4)?,
            b'I' | b'L' => self.push_decimal()?,
            b'F' => {
                let number = self.line()?.parse().map_err(|_| "no number".to_string())?;
                self.push(Value::Float(number));
            }
            b'G' => {
                let bits = self.number(8)?.swap_bytes(); // big-endian, unlike all others
                self.push(Value::Float(f64::from_bits(bits)));
            }
            0x8c => self.push_text(1)?,
            b'X' => self.push_text(4)?,
            0x8d => self.push_text(8)?,
            b'U' => self.push_text(1)?,
            b'T' => self.push_text(4)?,
            b'V' | b'S' => {
                let text = Value::Text(self.line()?.trim_matches(['\'', '"']).into());
                self.push(text);
            }
            b'C' => self.push_bytes(1)?,
            b'B' => self.push_bytes(4)?,
            0x8e | 0x96 => self.push_bytes(8)?,
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_to_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b')' => self.push(Value::Tuple(Vec::new())),
            b't' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Tuple(items));
            }
            count @ 0x85..=0x87 => {
                let start = self.stack.len().checked_sub(usize::from(count - 0x84));
                let items = self.stack.split_off(start.ok_or("the stack is empty")?);
                self.check_marks()?;
                self.push(Value::Tuple(items));
            }
            b']' => self.push(Value::List(Vec::new())),
            // Sets and frozen sets: nobody asks for their contents.
            0x8f => self.push(Value::Opaque("set".into())),
            b'l' | 0x91 => {
                let items = self.pop_to_mark()?;
                self.push(Value::List(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.append(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.pop_to_mark()?;
                self.append(items)?;
            }
            b'}' => self.push(Value::Dict(Vec::new())),
            b'd' => {
                let items = self.pop_to_mark()?;
                self.push(Value::Dict(pairs(&items)));
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set_items(&[key, value])?;
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)?;
            }
            b'p' => {
                let key = self.line()?.parse().map_err(|_| "no number".to_string())?;
                self.remember(key)?;
            }
            b'q' => self.remember_numbered(1)?,
            b'r' => self.remember_numbered(4)?,
            0x94 => self.remember(self.memo.len() as u64)?,
            b'g' => {
                let key = self.line()?.parse().map_err(|_| "no number".to_string())?;
                self.recall(key)?;
            }
            b'h' => self.recall_numbered(1)?,
            b'j' => self.recall_numbered(4)?,
            b'c' => {
                let name = self.class_name()?;
                self.push(Value::Class(name));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let class = match (self.get(module), self.get(name)) {
                    (Value::Text(module), Value::Text(name)) => full_name(module, name)?,
                    _ => return Err("the name of a class is no text".into()),
                };
                self.push(Value::Class(class));
            }
            b'R' | 0x81 => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.call(callable, arguments)?;
            }
            0x92 => {
                let (_, arguments, callable) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(callable, arguments)?;
            }
            b'o' | b'i' => self.instance()?,
            b'b' => drop(self.pop()?), // BUILD: the object stays as it is, without its state
            b'Q' => {
                let id = self.pop()?;
                let storage = self.storage(id);
                self.push(storage);
            }
            b'P' => {
                self.line()?;
                self.push(Value::Opaque("a persistent object".into()));
            }
            other => return Err(format!("opcode {other:#04x} is not one of a checkpoint")),
        }
        Ok(false)
    }

    /// What a class or function makes of its arguments, as far as tensors need it.
    fn call(&mut self, callable: Id, arguments: Id) -> Done {
        let name = match self.get(callable) {
            Value::Class(name) => Rc::clone(name),
            Value::Opaque(name) => return self.push_done(Value::Opaque(Rc::clone(name))),
            other => return Err(format!("{} is called", kind(other))),
        };
        let arguments = match self.get(arguments) {
            Value::Tuple(items) => items[..items.len().min(MAX_ARGUMENTS)].to_vec(),
            _ => Vec::new(),
        };
        match &*name {
            "collections.OrderedDict" | "collections.defaultdict" | "builtins.dict" => {
                self.push_done(Value::Dict(Vec::new()))
            }
            // The value itself, wrapped: a parameter, a subclass of tensors.
            "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state" => {
                let data = *arguments.first().ok_or("a parameter without data")?;
                self.stack.push(data);
                Ok(())
            }
            "torch._tensor._rebuild_from_type_v2" => match arguments[..] {
                [function, _, inner, ..] => match self.get(function) {
                    // One level only: the function may not be this one again.
                    Value::Class(name) if name.starts_with("torch._utils.") => {
                        self.call(function, inner)
                    }
                    _ => self.push_done(Value::Opaque(name)),
                },
                _ => Err("a tensor without parts".into()),
            },
            "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" => {
                let tensor = self.tensor(&arguments, None)?;
                self.push_done(Value::Tensor(Box::new(tensor)))
            }
            "torch._utils._rebuild_tensor_v3" => {
                let dtype = arguments.get(6).map(|&id| self.get(id));
                let Some(Value::Class(dtype)) = dtype else {
                    return Err("a tensor without a number type".into());
                };
                let tensor = self.tensor(&arguments, Some(Rc::clone(dtype)))?;
                self.push_done(Value::Tensor(Box::new(tensor)))
            }
            "torch.Size" if !arguments.is_empty() => {
                self.stack.push(arguments[0]);
                Ok(())
            }
            _ => self.push_done(Value::Opaque(name)),
        }
    }

    fn tensor(&self, arguments: &[Id], dtype: Option<Rc<str>>) -> Done<TensorValue> {
        let [storage, offset, shape, strides, ..] = arguments else {
            return Err("a tensor without parts".into());
        };
        let Value::Storage(storage) = self.get(*storage) else {
            return Err("a tensor without a storage".into());
        };
        let Some(offset) = self.whole(*offset) else {
            return Err("a tensor's offset is no whole number".into());
        };
        let numbers = |id: Id| match self.get(id) {
            Value::Tuple(items) | Value::List(items) if items.len() <= MAX_RANK => {
                items.iter().map(|&id| self.whole(id)).collect::<Option<Vec<u64>>>()
            }
            _ => None,
        };
        let (Some(shape), Some(strides)) = (numbers(*shape), numbers(*strides)) else {
            return Err("a tensor's shape is not a few whole numbers".into());
        };
        if shape.len() != strides.len() {
            return Err("a tensor's shape and strides do not go together".into());
        }
        Ok(TensorValue { storage: Rc::clone(storage), dtype, offset, shape, strides })
    }

    /// `("storage", class, key, location, length)`
    fn storage(&self, id: Id) -> Value {
        let unknown = Value::Opaque("a persistent object".into());
        let Value::Tuple(parts) = self.get(id) else { return unknown };
        let [tag, class, key, _, len, ..] = parts[..] else { return unknown };
        match (self.get(tag), self.get(class), self.get(key), self.whole(len)) {
            (Value::Text(tag), Value::Class(class), Value::Text(key), Some(len))
                if &**tag == "storage" =>
            {
                let (class, key) = (Rc::clone(class), Rc::clone(key));
                Value::Storage(Rc::new(Storage { class, key, len }))
            }
            _ => unknown,
        }
    }

    /// An object of protocol 0 or 1: its class and arguments after a mark, or its class in the text.
    fn instance(&mut self) -> Done {
        let is_named = self.bytes[self.at - 1] == b'i';
        let mut items = self.pop_to_mark()?;
        let class = if is_named {
            self.class_name()?
        } else if items.is_empty() {
            return Err("an object without a class".into());
        } else {
            match self.get(items.remove(0)) {
                Value::Class(name) => Rc::clone(name),
                other => return Err(format!("{} is called", kind(other))),
            }
        };
        self.push_done(Value::Opaque(class))
    }

    fn append(&mut self, items: Vec<Id>) -> Done {
        match self.top_value()? {
            Value::List(list) => list.extend(items),
            Value::Opaque(_) => {}
            other => return Err(format!("{} is appended to", kind(other))),
        }
        Ok(())
    }

    fn set_items(&mut self, items: &[Id]) -> Done {
        match self.top_value()? {
            Value::Dict(entries) => entries.extend(pairs(items)),
            Value::Opaque(_) => {}
            other => return Err(format!("{} gets entries", kind(other))),
        }
        Ok(())
    }

    /// Two lines: a module and a name in it.
    fn class_name(&mut self) -> Done<Rc<str>> {
        let module = self.line()?.to_string();
        full_name(&module, self.line()?)
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.values.len() as Id);
        self.values.push(value);
    }

    fn push_done(&mut self, value: Value) -> Done {
        self.push(value);
        Ok(())
    }

    fn push_number(&mut self, num_bytes: usize) -> Done {
        let number = self.number(num_bytes)? as i64;
        self.push_done(Value::Int(number))
    }

    /// An integer of any length, in two's complement. Longer ones than 64 bits are nobody's shape.
    fn push_long(&mut self, bytes_of_len: usize) -> Done {
        let len = self.number(bytes_of_len)?;
        let bytes = self.take(len)?;
        let value = match bytes.len() {
            0..=8 => {
                let sign = bytes.last().is_some_and(|&last| last >= 0x80);
                let mut padded = [if sign { 0xff } else { 0 }; 8];
                padded[..bytes.len()].copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(padded))
            }
            _ => Value::Opaque("a long integer".into()),
        };
        self.push_done(value)
    }

    fn push_decimal(&mut self) -> Done {
        let value = match self.line()?.trim_end_matches('L') {
            "00" => Value::Bool(false),
            "01" => Value::Bool(true),
            digits => match digits.parse() {
                Ok(number) => Value::Int(number),
                Err(_) => Value::Opaque("a long integer".into()),
            },
        };
        self.push_done(value)
    }

    fn push_text(&mut self, bytes_of_len: usize) -> Done {
        let len = self.number(bytes_of_len)?;
        let text = Value::Text(String::from_utf8_lossy(self.take(len)?).into());
        self.push_done(text)
    }

    fn push_bytes(&mut self, bytes_of_len: usize) -> Done {
        let len = self.number(bytes_of_len)?;
        self.take(len)?;
        self.push_done(Value::Bytes)
    }

    fn remember(&mut self, key: u64) -> Done {
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn remember_numbered(&mut self, num_bytes: usize) -> Done {
        let key = self.number(num_bytes)?;
        self.remember(key)
    }

    fn recall(&mut self, key: u64) -> Done {
        let id = self.memo.get(&key).ok_or_else(|| format!("nothing was remembered as {key}"))?;
        self.stack.push(*id);
        Ok(())
    }

    fn recall_numbered(&mut self, num_bytes: usize) -> Done {
        let key = self.number(num_bytes)?;
        self.recall(key)
    }

    fn get(&self, id: Id) -> &Value {
        &self.values[id as usize]
    }

    fn whole(&self, id: Id) -> Option<u64> {
        match self.get(id) {
            Value::Int(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    fn top(&self) -> Done<Id> {
        Ok(*self.stack.last().ok_or("the stack is empty")?)
    }

    fn top_value(&mut self) -> Done<&mut Value> {
        let top = self.top()?;
        Ok(&mut self.values[top as usize])
    }

    fn pop(&mut self) -> Done<Id> {
        let top = self.stack.pop().ok_or("the stack is empty")?;
        self.check_marks()?;
        Ok(top)
    }

    fn pop_to_mark(&mut self) -> Done<Vec<Id>> {
        let mark = self.marks.pop().ok_or("no mark is on the stack")?;
        Ok(self.stack.split_off(mark))
    }

    /// A mark stays within the stack.
    fn check_marks(&self) -> Done {
        match self.marks.last() {
            Some(&mark) if mark > self.stack.len() => Err("a mark is taken for a value".into()),
            _ => Ok(()),
        }
    }

    fn byte(&mut self) -> Done<u8> {
        Ok(self.number(1)? as u8)
    }

    fn number(&mut self, num_bytes: usize) -> Done<u64> {
        let bytes = self.take(num_bytes as u64)?;
        let mut padded = [0; 8];
        padded[..num_bytes].copy_from_slice(bytes);
        Ok(u64::from_le_bytes(padded))
    }

    fn line(&mut self) -> Done<&str> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|&byte| byte == b'\n').ok_or("a line does not end")?;
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|_| "a line is no text".into())
    }

    fn take(&mut self, len: u64) -> Done<&[u8]> {
        let rest = &self.bytes[self.at..];
        let len = usize::try_from(len).ok().filter(|&len| len <= rest.len());
        let len = len.ok_or("it ends in the middle")?;
        self.at += len;
        Ok(&rest[..len])
    }
}

fn full_name(module: &str, name: &str) -> Done<Rc<str>> {
    match module.len() + name.len() < MAX_NAME {
        true => Ok(format!("{module}.{name}").into()),
        false => Err("the name of a class is too long".into()),
    }
}

/// Keys and values that follow one another; a key without a value is dropped.
fn pairs(items: &[Id]) -> Vec<(Id, Id)> {
    items.as_chunks::<2>().0.iter().map(|&[key, value]| (key, value)).collect()
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::None | Value::Bool(_) | Value::Int(_) | Value::Float(_) => "a number",
        Value::Text(_) | Value::Bytes => "a text",
        Value::Tuple(_) | Value::List(_) => "a list",
        Value::Dict(_) => "a dict",
        Value::Class(_) => "a class",
        Value::Storage(_) | Value::Tensor(_) => "a tensor",
        Value::Opaque(_) => "an object",
    }
}
