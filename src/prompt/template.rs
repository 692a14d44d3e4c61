//! Jinja templates: what a prompt says, from the items of a history and fields of a request.
//!
//! A template comes with a model, so it reads nothing but the variables that it is given, and
//! [`FUEL`] bounds what it may compute and write. minijinja charges for instructions, texts and
//! the items that a filter visits, but it turns a list or map into text before it knows how long
//! the text becomes, so [`pay_for`] charges for it first wherever one is printed or given to a
//! filter, function or method that reads it as text. Operators cannot be reached: `~`, `+`, `in`
//! and comparisons of lists that hold the same list many times over, or that are nested many
//! thousands deep, are not bounded.

use std::fmt;
use std::sync::Arc;

use minijinja::syntax::{SyntaxConfig, SyntaxConfigBuilder};
use minijinja::value::{Kwargs, Rest, Serde, StringInput, ValueKind, ValueOrKwargs};
use minijinja::{Environment, ErrorKind, State, UndefinedBehavior, Value, filters};
use serde::Serialize;

/// What one rendering may spend: an instruction, or 64 bytes of data, costs one. It is enough for
/// some megabytes of text, and spent within a fraction of a second.
const FUEL: u64 = 1_000_000;

/// The bytes of data that one unit of fuel pays for, as in minijinja.
const BYTES_OF_FUEL: usize = 64;

/// How deep a value that becomes text may be nested: deeper ones would exhaust the stack.
const MAX_DEPTH: usize = 64;

/// The name of an environment's only template.
const NAME: &str = "template";

/// A compiled template.
#[derive(Clone)]
pub struct Template {
    source: Arc<str>,
    environment: Arc<Environment<'static>>,
}

impl Template {
    /// Compiles a prompt's template. A variable that is missing is an error when it is rendered.
    ///
    /// # Errors
    /// What is wrong with it, with its line.
    pub fn prompt(source: &str) -> Result<Template, String> {
        let mut syntax = SyntaxConfig::builder();
        let mut environment = environment(syntax.keep_trailing_newline(true))?;
        environment.set_undefined_behavior(UndefinedBehavior::SemiStrict);
        Template::compile(environment, source)
    }

    /// Compiles a chat template, with the settings of Hugging Face's `apply_chat_template`.
    ///
    /// # Errors
    /// What is wrong with it, with its line.
    pub fn chat(source: &str) -> Result<Template, String> {
        let mut syntax = SyntaxConfig::builder();
        let environment = environment(syntax.trim_blocks(true).lstrip_blocks(true))?;
        Template::compile(environment, &without_generation_tags(source))
    }

    fn compile(mut environment: Environment<'static>, source: &str) -> Result<Template, String> {
        environment.add_template_owned(NAME, source.to_string()).map_err(|error| words(&error))?;
        Ok(Template { source: source.into(), environment: Arc::new(environment) })
    }

    /// Renders the template.
    ///
    /// # Errors
    /// What a variable lacks, what the template refuses, or that it goes on for too long.
    pub fn render(&self, variables: &impl Serialize) -> Result<String, String> {
        let variables = Value::from(Serde(variables));
        let template = self.environment.get_template(NAME).map_err(|error| words(&error))?;
        template.render(variables).map_err(|error| match error.kind() {
            ErrorKind::OutOfFuel => {
                "the template computes or writes more than a prompt may; does it loop?".into()
            }
            _ => words(&error),
        })
    }
}

impl PartialEq for Template {
    fn eq(&self, other: &Template) -> bool {
        self.source == other.source
    }
}

impl fmt::Debug for Template {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("Template").field(&self.source).finish()
    }
}

/// An error with the reasons behind it, in one line.
fn words(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text.replace('\n', " ")
}

/// What templates written for Python's Jinja rely on.
fn environment(syntax: &mut SyntaxConfigBuilder) -> Result<Environment<'static>, String> {
    let mut environment = Environment::new();
    environment.set_syntax(syntax.build().map_err(|error| words(&error))?);
    environment.set_fuel(Some(FUEL));
    environment.set_formatter(|out, state, value| {
        pay_for(state, value, 0)?;
        minijinja::escape_formatter(out, state, value)
    });
    environment.set_unknown_method_callback(|state, value, method, arguments| {
        // The methods of maps look no deeper than their keys.
        if value.kind() != ValueKind::Map {
            for value in arguments.iter().chain([value]) {
                pay_for(state, value, 0)?;
            }
        }
        if let ("format", Some(text)) = (method, value.as_str()) {
            pay_for_format(state, text, arguments)?;
        }
        minijinja_contrib::pycompat::unknown_method_callback(state, value, method, arguments)
    });
    for (name, filter) in filters_of_text() {
        environment.add_filter(
            name,
            move |state: &mut State<'_, '_>, arguments: Rest<ValueOrKwargs>| {
                let arguments = arguments.into_values();
                for value in &arguments {
                    pay_for(state, value, 0)?;
                }
                filter.call(state, &arguments)
            },
        );
    }
    // They write values for people who debug a template, and no prompt.
    environment.remove_filter("pprint");
    environment.remove_global("debug");
    environment.add_function("raise_exception", |message: &str| -> Result<Value, _> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_string()))
    });
    environment.add_function("strftime_now", strftime_now);
    Ok(environment)
}

/// minijinja's filters that read lists and maps as text, or that compare them.
fn filters_of_text() -> [(&'static str, Value); 20] {
    [
        ("capitalize", Value::from_function(filters::capitalize)),
        ("e", Value::from_function(filters::escape)),
        ("escape", Value::from_function(filters::escape)),
        ("format", Value::from_function(format)),
        ("groupby", Value::from_function(filters::groupby)),
        ("indent", Value::from_function(indent)),
        ("join", Value::from_function(filters::join)),
        ("lines", Value::from_function(filters::lines)),
        ("lower", Value::from_function(filters::lower)),
        ("max", Value::from_function(filters::max)),
        ("min", Value::from_function(filters::min)),
        ("replace", Value::from_function(replace)),
        ("sort", Value::from_function(filters::sort)),
        ("split", Value::from_function(filters::split)),
        ("string", Value::from_function(filters::string)),
        ("title", Value::from_function(filters::title)),
        ("tojson", Value::from_function(to_json)),
        ("trim", Value::from_function(filters::trim)),
        ("unique", Value::from_function(filters::unique)),
        ("upper", Value::from_function(filters::upper)),
    ]
}

/// minijinja's `indent`, charged for the spaces before they are written.
fn indent(
    state: &State<'_, '_>,
    value: StringInput<'_>,
    width: Option<usize>,
    first: Option<bool>,
    options: Kwargs,
) -> Result<Value, minijinja::Error> {
    let width = width.or(options.get("width")?).unwrap_or(4);
    let first = first.or(options.get("first")?);
    let blank: Option<bool> = options.get("blank")?;
    options.assert_all_used()?;
    let lines = value.as_str().lines().count() + 1;
    state.consume_fuel((lines.saturating_mul(width) / BYTES_OF_FUEL) as u64)?;
    filters::indent(value, Some(width), first, blank, Kwargs::from_iter::<[(&str, Value); 0]>([]))
}

/// minijinja's `format`, charged for what its places may become.
fn format(
    state: &mut State<'_, '_>,
    text: &Value,
    arguments: Rest<ValueOrKwargs>,
) -> Result<Value, minijinja::Error> {
    let values: Vec<Value> = arguments.iter().map(|value| Value::clone(value)).collect();
    pay_for_format(state, text.as_str().unwrap_or_default(), &values)?;
    filters::format(state, text, arguments)
}

/// Charges for a text with places: each may take all arguments, and be as wide as any number says
/// that the text holds. The arguments are paid for.
fn pay_for_format(
    state: &State<'_, '_>,
    text: &str,
    arguments: &[Value],
) -> Result<(), minijinja::Error> {
    let places = text.matches(['{', '%']).count();
    let bytes: usize = arguments.iter().map(|value| value.to_string().len()).sum();
    let numbers = text.split(|letter: char| !letter.is_ascii_digit()).filter(|run| !run.is_empty());
    let widths = numbers
        .map(|number| number.parse().unwrap_or(usize::MAX))
        .fold(0, |sum: usize, width| sum.saturating_add(width));
    let bytes = places.saturating_mul(bytes).saturating_add(widths);
    state.consume_fuel((bytes / BYTES_OF_FUEL) as u64)
}

/// The method `replace` of a text, which takes a count as Jinja's filter does.
fn replace(
    state: &mut State<'_, '_>,
    value: &Value,
    from: &Value,
    to: &Value,
    count: Option<i32>,
) -> Result<Value, minijinja::Error> {
    let text = |value: &Value| Value::from(value.to_string());
    let arguments = [text(from), text(to), Value::from(count.unwrap_or(-1))];
    text(value).call_method(state, "replace", &arguments)
}

/// Charges for the text that a list or map becomes, before it becomes one.
///
/// # Errors
/// The fuel does not suffice, or the value is nested too deep.
fn pay_for(state: &State<'_, '_>, value: &Value, depth: usize) -> Result<(), minijinja::Error> {
    if depth > MAX_DEPTH {
        let reason = format!("the value is nested deeper than {MAX_DEPTH} lists");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason));
    }
    if depth > 0 {
        let bytes = value.as_str().map_or(0, str::len);
        state.consume_fuel(1 + (bytes / BYTES_OF_FUEL) as u64)?;
    }
    let is_map = value.kind() == ValueKind::Map;
    if is_map || matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        for item in value.try_iter()? {
            pay_for(state, &item, depth + 1)?;
            if is_map {
                pay_for(state, &value.get_item(&item)?, depth + 1)?;
            }
        }
    }
    Ok(())
}

/// Today's date, which a request has to say: an answer depends on its request alone.
fn strftime_now(state: &State<'_, '_>, format: String) -> Result<Value, minijinja::Error> {
    state.lookup("today").ok_or_else(|| {
        let text = format!(
            "the template asks for the date as {format:?}; give it as a text in the request's \
             \"variables\", as {{\"today\": \"26 Jul 2024\"}}"
        );
        minijinja::Error::new(ErrorKind::UndefinedError, text)
    })
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=...)`.
fn to_json(
    value: Value,
    arguments: Rest<Value>,
    options: Kwargs,
) -> Result<Value, minijinja::Error> {
    /// More spaces than any prompt takes.
    const MAX_INDENT: usize = 64;
    let _ = arguments;
    let indent: Option<usize> = options.get("indent")?;
    // Further options of transformers' filter do not change what this one writes by default.
    let _: Option<Value> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    if indent.is_some_and(|indent| indent > MAX_INDENT) {
        let reason = format!("tojson indents by at most {MAX_INDENT} spaces");
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason));
    }
    let mut text = String::new();
    write_json(&value, indent, 0, &mut text)?;
    Ok(Value::from_safe_string(text))
}

fn write_json(
    value: &Value,
    indent: Option<usize>,
    depth: usize,
    text: &mut String,
) -> Result<(), minijinja::Error> {
    /// Deeper values are an error: they would exhaust the stack.
    const MAX_DEPTH: usize = 64;
    /// More text than any prompt takes.
    const MAX_BYTES: usize = 1 << 22;
    if depth > MAX_DEPTH || text.len() > MAX_BYTES {
        let reason = "the value is too large or too deep for tojson";
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason));
    }
    let line = |text: &mut String, depth: usize| {
        if let Some(indent) = indent {
            text.push('\n');
            text.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    let comma = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::Map => {
            text.push('{');
            for (number, key) in value.try_iter()?.enumerate() {
                text.push_str(if number > 0 { comma } else { "" });
                line(text, depth + 1);
                write_json(&Value::from(key.to_string()), indent, depth + 1, text)?;
                text.push_str(": ");
                write_json(&value.get_item(&key)?, indent, depth + 1, text)?;
            }
            if value.len() != Some(0) {
                line(text, depth);
            }
            text.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            text.push('[');
            let mut is_empty = true;
            for (number, value) in value.try_iter()?.enumerate() {
                is_empty = false;
                text.push_str(if number > 0 { comma } else { "" });
                line(text, depth + 1);
                write_json(&value, indent, depth + 1, text)?;
            }
            if !is_empty {
                line(text, depth);
            }
            text.push(']');
        }
        _ => {
            let json = serde_json::to_string(value);
            let failed = |error: serde_json::Error| {
                minijinja::Error::new(ErrorKind::BadSerialization, error.to_string())
            };
            text.push_str(&json.map_err(failed)?);
        }
    }
    Ok(())
}

/// A chat template without `{% generation %}` and `{% endgeneration %}`, which mark for training
/// what the assistant says and write nothing.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}") else { break };
        let (before, tag) = (&rest[..start], &rest[start..start + len + 2]);
        let name = tag[2..tag.len() - 2].trim_matches(['-', '+']).trim();
        text.push_str(before);
        match name {
            "generation" => text.push_str(&tag.replace(name, "if true")),
            "endgeneration" => text.push_str(&tag.replace(name, "endif")),
            _ => text.push_str(tag),
        }
        rest = &rest[start + len + 2..];
    }
    text.push_str(rest);
    text
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use serde_json::json;

    use super::*;

    fn render(source: &str) -> Result<String, String> {
        Template::chat(source)?.render(&json!({"name": "a", "list": [1, 2]}))
    }

    #[test]
    fn a_template_that_loops_or_explodes_is_ended() {
        let doubling = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(64) %}\
                        {% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}";
        let joined = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(64) %}\
                      {% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}";
        for source in [
            doubling,
            joined,
            "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
            "{% for i in range(10**9) %}x{% endfor %}",
            "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
            "{% include 'template' %}",
            "{% extends 'template' %}",
            "{{ 'a' * 1000000000 }}",
            "{{ (('a' * 10000) * 10000) * 10000 }}",
            "{{ 'a' ~ ('b' * 99999999) }}",
            "{{ ['a' * 10000000] * 10000 }}",
            "{{ [['a'] * 99999999] * 99999999 }}",
            "{{ (['a' * 10000000] * 10000) | string }}",
            "{{ (['a' * 10000000] * 10000) | upper }}",
            "{{ (['a' * 10000000] * 10000) | replace('a', 'b') }}",
            "{{ (['a' * 10000000] * 10000) | join }}",
            "{{ [['a' * 10000000] * 10000] | join }}",
            "{{ ''.join([['a' * 10000000] * 10000]) }}",
            "{{ '{}'.format(['a' * 10000000] * 10000) }}",
            "{{ '%s' | format(['a' * 10000000] * 10000) }}",
            "{{ (['a' * 10000000] * 10000) | tojson }}",
            "{{ [1, 2] | tojson(indent=1000000000000) }}",
            "{% for i in range(99999) %}{% set x = (['a'] * 99999) | tojson %}{% endfor %}",
            "{{ '%1000000000d' | format(1) }}",
            "{{ '{:1000000000}'.format(1) }}",
            "{{ '{:>1000000000}'.format('a') }}",
            "{{ '{:>1000000000000000000}'.format('a') }}",
            "{{ ('{0}' * 100000).format('a' * 1000000) }}",
            "{{ ('%(x)s' * 100000) | format(x='a' * 1000000) }}",
            "{{ 'a\nb' | indent(1000000000000) }}",
            "{{ raise_exception(['a' * 10000000] * 10000) }}",
            "{% set ns = namespace(x=[1]) %}{% for i in range(64) %}\
             {% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace(x=[1]) %}{% for i in range(100) %}\
             {% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
        ] {
            let start = Instant::now();
            let outcome = render(source);
            assert!(outcome.is_err(), "{source}");
            assert!(start.elapsed() < Duration::from_secs(3), "{source}: {:?}", start.elapsed());
        }
    }

    #[test]
    fn filters_that_are_charged_do_what_jinjas_do() {
        for (source, expected) in [
            ("{{ 'a\nb' | indent }}", "a\n    b"),
            ("{{ 'a\nb' | indent(width=1, first=true) }}", " a\n b"),
            ("{{ 'aaa' | replace('a', 'b') }}", "bbb"),
            ("{{ 'aaa' | replace('a', 'b', 1) }}", "baa"),
            ("{{ list | join('-') }}{{ list | string }}{{ list }}", "1-2[1, 2][1, 2]"),
            ("{{ [2, 1] | sort(reverse=true) | first }}", "2"),
            ("{{ ' x ' | trim | upper }}", "X"),
            ("{{ '{:>3}{}'.format('a', 2) }}{{ '%s%03d' | format('b', 7) }}", "  a2b007"),
        ] {
            assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
        }
    }

    #[test]
    fn json_is_pythons() {
        let rendered = render("{{ {'a': [1, 2.5, true, none], 'b': '<é>\"', 'c': {}} | tojson }}");
        let expected = "{\"a\": [1, 2.5, true, null], \"b\": \"<é>\\\"\", \"c\": {}}";
        assert_eq!(rendered.as_deref(), Ok(expected));
        let rendered = render("{{ {'a': [1]} | tojson(indent=2) }}");
        assert_eq!(rendered.as_deref(), Ok("{\n  \"a\": [\n    1\n  ]\n}"));
    }

    #[test]
    fn marks_for_training_write_nothing() {
        let source = "a{% generation %}b{%- endgeneration -%} c{% if true %}d{% endif %}";
        assert_eq!(render(source).as_deref(), Ok("abcd"));
    }

    #[test]
    fn the_date_is_the_requests() {
        let error = render("{{ strftime_now('%d') }}").expect_err("no date");
        assert!(error.contains("today"), "{error}");
        let template = Template::chat("{{ strftime_now('%d') }}").expect("a template");
        assert_eq!(template.render(&json!({"today": "7"})).as_deref(), Ok("7"));
    }

    #[test]
    fn a_variable_that_is_missing_is_an_error_of_a_prompt() {
        let template = Template::prompt("{{ query }}\n").expect("a template");
        assert!(template.render(&json!({})).is_err());
        assert_eq!(template.render(&json!({"query": "q"})).as_deref(), Ok("q\n"));
    }
}
