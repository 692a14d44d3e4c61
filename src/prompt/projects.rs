//! The prompts of published projects, ready made: `"project": "minionerec"` in `sidereal.json`.
//!
//! Each is what the project's own evaluation feeds to the model, read in its code. A file's own
//! fields stand before those of its project.

use serde_json::{Map, Value, json};

/// A published project.
#[derive(Debug, Clone, Copy)]
pub struct Project {
    /// Its name in `sidereal.json`.
    pub name: &'static str,
    /// What its prompt is, in one line.
    pub summary: &'static str,
    layout: fn() -> Value,
}

/// All projects, by name.
pub const PROJECTS: [Project; 8] = [
    Project {
        name: "forge",
        summary: "FORGE (al_sid): chat turns from pieces encoded alone, the user's cut to 1,480 tokens",
        layout: forge,
    },
    Project {
        name: "grid",
        summary: "GRID's TIGER: a separator after each item, 4 levels of 256 codes",
        layout: grid,
    },
    Project {
        name: "lc-rec",
        summary: "LC-Rec and LETTER-LC-Rec: an instruction with 20 items, its first template",
        layout: lc_rec,
    },
    Project {
        name: "letter",
        summary: "LETTER-TIGER: the codes of 20 items and an end token",
        layout: tiger,
    },
    Project {
        name: "minionerec",
        summary: "MiniOneRec: an Alpaca instruction, the history in a sentence; newline and end after",
        layout: minionerec,
    },
    Project {
        name: "onerec",
        summary: "OneRec-1.7B and 8B: chat messages, thinking off, <|sid_begin|> forced",
        layout: onerec,
    },
    Project {
        name: "p5",
        summary: "P5: its prompt 2-3, items written as their numbers, whole-word embeddings",
        layout: p5,
    },
    Project {
        name: "tiger",
        summary: "TIGER on Hugging Face's T5: the codes of 20 items and an end token",
        layout: tiger,
    },
];

/// What `sidereal.json` says for a project.
///
/// # Errors
/// The names that there are.
pub fn layout(name: &str) -> Result<Map<String, Value>, String> {
    let project = PROJECTS.iter().find(|project| project.name == name.to_lowercase());
    match project.map(|project| (project.layout)()) {
        Some(Value::Object(layout)) => Ok(layout),
        _ => {
            let names = PROJECTS.map(|project| project.name).join(", ");
            Err(format!("there is no project {name:?}; {names} are known"))
        }
    }
}

/// `evaluate.py` with `EvalSidDataset`: instruction and input are encoded apart.
fn minionerec() -> Value {
    json!({
        "prompt": {"pieces": [
            "{% if bos_token is defined %}{{ bos_token }}{% endif %}",
            "Below is an instruction that describes a task, paired with an input that provides \
             further context. Write a response that appropriately completes the request. \n\n\
             ### Instruction:\n\
             Can you predict the next possible item that the user may expect?\n\n",
            "### User Input: \n\
             Can you predict the next possible item the user may expect, given the following \
             chronological interaction history: \
             {% for item in items %}{{ item.sid }}{% if not loop.last %}, {% endif %}{% endfor %}\
             \n\n### Response:\n",
        ]},
        "suffix": ["\n", "{{ eos_token }}"],
    })
}

/// `test.py` with the first of its 17 templates; the answer follows without a space.
fn lc_rec() -> Value {
    json!({
        "prompt": {
            "pieces": [{
                "text": "Below is an instruction that describes a task. Write a response that \
                         appropriately completes the request.\n\n### Instruction:\n\
                         The user has interacted with items \
                         {% for item in items %}{{ item.sid }}{% if not loop.last %}, {% endif %}\
                         {% endfor %} in chronological order. Can you predict the next possible \
                         item that the user may expect?\n\n### Response:",
                "special_tokens": true,
            }],
            "max_items": 20,
        },
        "suffix": ["{{ eos_token }}"],
    })
}

/// Codes without anything between items; generation goes on to the end token.
fn tiger() -> Value {
    json!({
        "prompt": {"suffix": ["{{ eos_token }}"], "max_items": 20},
        "suffix": ["{{ eos_token }}"],
    })
}

/// The rows of GRID's embedding table, then its separator.
fn grid() -> Value {
    let level = |level: u32| json!({"size": 256, "first_token": 256 * level});
    json!({
        "levels": (0..4).map(level).collect::<Vec<Value>>(),
        "prompt": {
            "pieces": [{"items": "{{ sid }}", "separator": [1024], "trailing_separator": true}],
        },
        "normalize": "level",
    })
}

/// Sequential recommendation with its template 2-3, which P5 was trained and is evaluated with.
fn p5() -> Value {
    json!({
        "phrases": "items",
        "prompt": {
            "pieces": [{
                "text": "Here is the purchase history list of user_{{ user }} :\n\
                         {{ items | map(attribute='item') | join(' , ') }}\n\
                         try to recommend next item to the user",
                "special_tokens": true,
            }],
        },
    })
}

/// The video task of OpenOneRec with the first system and user texts, without thinking.
fn onerec() -> Value {
    json!({
        "prompt": {
            "pieces": [{
                "messages": [
                    {
                        "role": "system",
                        "content": "你是一个智能推荐助手，能够根据用户的浏览历史预测用户可能感兴趣的下一个内容。",
                    },
                    {
                        "role": "user",
                        "content": "根据以下用户浏览记录，请预测用户接下来可能观看的内容：\n\
                                    {% for item in items %}<|sid_begin|>{{ item.sid }}<|sid_end|>\
                                    {% endfor %}",
                    },
                ],
                "variables": {"enable_thinking": false},
            }],
            "max_items": 512,
        },
        "forced": {"tokens": "<|sid_begin|>"},
    })
}

/// `_encode_data` of its Qwen model: roles, marks and newlines are encoded alone.
fn forge() -> Value {
    json!({
        "prompt": {"pieces": [
            "<|im_start|>", "system", "\n",
            "你是一个推荐系统，根据用户的历史行为，预测用户在电商场景的下一步行为。我会给你一串连续行为的\
             语义编码，按照用户点击的时间顺序排列，每个行为用三个词表示。",
            "<|im_end|>", "\n", "<|im_start|>", "user", "\n",
            {
                "text": "当前用户的历史行为如下：{% for item in items %}{{ item.sid }}{% endfor %}",
                "max_tokens": 1480,
                "cut": "end",
            },
            "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n",
        ]},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_project_has_a_prompt_that_can_be_read() {
        for project in PROJECTS {
            let layout = layout(project.name).expect("a project");
            let entry =
                serde_json::from_value::<crate::prompt::PromptEntry>(layout["prompt"].clone());
            entry.unwrap_or_else(|error| panic!("{}: {error}", project.name));
        }
        assert!(layout("hstu").is_err_and(|reason| reason.contains("minionerec")));
    }
}
