//! A request as a short program: stages on one context.
//!
//! All stages are known when a request arrives, so that its worst case is leased at its admission.
//! They run in order along one **trunk**. The trunk is the context at first; it goes on as beams
//! from the first stage that a context cannot take.
//!
//! | stage | what it does |
//! | --- | --- |
//! | [`Stage::Read`] | extends the context by prompt tokens |
//! | [`Stage::Forced`] | extends the context where that is possible, else every beam, a step a token |
//! | [`Stage::Think`] | extends the one beam by drawn tokens, up to a stop token or text |
//! | [`Stage::ReadNamed`] | branches off: a slot of its own ends with the named tokens; the trunk stays |
//! | [`Stage::Search`] | extends the beams by the levels of a semantic ID, or by the tokens of a phrase |
//!
//! The trunk ends as one slot for each search. The scheduler sees leases and steps alone: a further
//! stage is a variant here, with what it leases and what each of its steps chooses from.

use std::sync::Arc;

use crate::backend::StepChoice;
use crate::models::PromptKind;
use crate::models::config::SidLayout;
use crate::pages;
use crate::schedule::Needs;
use crate::search::{Constraint, Normalization};

/// One stage of a program.
#[derive(Clone)]
pub(super) enum Stage {
    /// Reads tokens into the context.
    Read(Vec<u32>),
    /// Goes on with given tokens.
    ///
    /// They extend the context where nothing needs their log-probabilities, no slot has branched
    /// off, and the decoder itself reads the context. Else each is a step of every beam.
    Forced {
        /// In order.
        tokens: Vec<u32>,
        /// Whether their log-probabilities are part of the scores.
        is_counted: bool,
    },
    /// Draws a token in each of so many steps at most, the last of which may be for a stop token. It
    /// stands before everything that has several beams.
    Think { num_steps: usize },
    /// The log-probabilities of these tokens, all different, right after the stages before.
    ReadNamed(Vec<u32>),
    /// Searches the catalog's trie, or its phrases.
    Search(Search),
}

/// The searches of a request, all along one trunk.
#[derive(Clone)]
pub(super) struct Search {
    /// The beam width by level, or by the tokens of the longest phrase and its end.
    pub widths: Vec<usize>,
    /// Whether phrases are searched.
    pub is_of_phrases: bool,
    /// How many there are: one for each group, or for each branch of a thought.
    pub count: usize,
    /// What scores are normalised over.
    pub normalization: Normalization,
    /// What may follow a prefix.
    pub constraint: Constraint,
}

/// A request's context and slots.
pub(super) struct Program {
    /// The tokens of the context, those that are forced into it included.
    tokens: Vec<u32>,
    /// Tokens that the context is leased for, at least as many as it begins with.
    context_capacity: usize,
    slots: Vec<SlotProgram>,
}

/// What one slot does, from the end of the context on.
pub(super) struct SlotProgram {
    pub output: Output,
    pub normalization: Normalization,
    pub constraint: Constraint,
    /// Shared by the searches of a request.
    steps: Arc<[Step]>,
}

/// What the beams of a slot become in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    /// The log-probabilities of named tokens.
    LogProbs,
    /// The items of one search.
    Items,
}

/// One step of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Step {
    choice: Choice,
    /// Levels of the semantic ID that were chosen before.
    depth: usize,
    /// Beams that are kept.
    width: usize,
}

/// A [`StepChoice`] that owns its tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Choice {
    Level(usize),
    Forced { token: u32, is_counted: bool },
    Tokens(Vec<u32>),
    Phrase,
    Sample { num_left: usize },
}

impl Program {
    /// Lays out stages for a network that reads its prompt in one way or the other.
    pub fn new(stages: Vec<Stage>, prompt: PromptKind) -> Program {
        let mut program = Program { tokens: Vec::new(), context_capacity: 0, slots: Vec::new() };
        let mut trunk: Vec<Step> = Vec::new();
        let mut search = None;
        for stage in stages {
            match stage {
                Stage::Read(tokens) => program.tokens.extend(tokens),
                Stage::Forced { tokens, is_counted } => {
                    let has_left = !trunk.is_empty() || !program.slots.is_empty();
                    if prompt.is_whole() || has_left || is_counted {
                        trunk.extend(forced_steps(&trunk, &tokens, is_counted));
                    } else {
                        program.tokens.extend(tokens);
                    }
                }
                Stage::Think { num_steps } => {
                    let step =
                        |num_left| Step { choice: Choice::Sample { num_left }, depth: 0, width: 1 };
                    trunk.extend((0..num_steps).rev().map(step));
                }
                Stage::ReadNamed(tokens) => program.slots.push(read_named(&trunk, tokens)),
                Stage::Search(found) => {
                    let levels = found.widths.iter().enumerate();
                    trunk.extend(levels.map(|(level, &width)| Step {
                        choice: match found.is_of_phrases {
                            true => Choice::Phrase,
                            false => Choice::Level(level),
                        },
                        depth: level,
                        width,
                    }));
                    search = Some(found);
                }
            }
        }
        if let Some(Search { count, normalization, constraint, .. }) = search {
            let steps: Arc<[Step]> = trunk.into();
            program.slots.extend((0..count).map(|_| SlotProgram {
                output: Output::Items,
                normalization,
                constraint,
                steps: Arc::clone(&steps),
            }));
        }
        program.context_capacity = program.tokens.len();
        program
    }

    /// The program of a search that says nothing of its own, with an empty prompt: what every
    /// engine must be able to run. `num_phrase_steps`: those of the longest phrase, where it writes
    /// phrases.
    pub fn of_layout(
        layout: &SidLayout,
        num_phrase_steps: Option<usize>,
        prompt: PromptKind,
    ) -> Program {
        let mut stages = Vec::new();
        if let Some(forced) = &layout.forced {
            let (tokens, is_counted) = (forced.tokens.clone(), forced.is_counted);
            stages.push(Stage::Forced { tokens, is_counted });
        }
        stages.push(Stage::Search(Search {
            widths: vec![1; num_phrase_steps.unwrap_or(layout.levels.len())],
            is_of_phrases: num_phrase_steps.is_some(),
            count: 1,
            normalization: layout.normalization,
            constraint: Constraint::Trie,
        }));
        stages.push(Stage::Forced { tokens: layout.suffix.clone(), is_counted: true });
        Program::new(stages, prompt)
    }

    /// The tokens of the context, before any stage has grown it.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens that the context is leased for.
    pub fn context_capacity(&self) -> usize {
        self.context_capacity
    }

    /// The slots, in the order of their stages.
    pub fn slots(&self) -> &[SlotProgram] {
        &self.slots
    }

    /// Steps of the slot that takes most.
    pub fn max_steps(&self) -> usize {
        self.slots.iter().map(SlotProgram::num_steps).max().unwrap_or(0)
    }

    /// What the request takes from its admission to its end.
    pub fn needs(&self) -> Needs {
        Needs {
            context_pages: pages::context_pages(self.context_capacity),
            tail_pages: self.slots.iter().map(SlotProgram::tail_pages).sum(),
            beam_rows: self.slots.iter().map(SlotProgram::typical_width).sum(),
        }
    }
}

fn forced_steps(trunk: &[Step], tokens: &[u32], is_counted: bool) -> Vec<Step> {
    let (depth, width) = trunk.last().map_or((0, 1), |step| (step.next_depth(), step.width));
    let step = |&token| Step { choice: Choice::Forced { token, is_counted }, depth, width };
    tokens.iter().map(step).collect()
}

/// A slot that follows the trunk and ends with named tokens. No token before them is part of their
/// log-probabilities.
fn read_named(trunk: &[Step], tokens: Vec<u32>) -> SlotProgram {
    let mut steps = trunk.to_vec();
    for step in &mut steps {
        if let Choice::Forced { is_counted, .. } = &mut step.choice {
            *is_counted = false;
        }
    }
    steps.push(Step { depth: 0, width: tokens.len(), choice: Choice::Tokens(tokens) });
    SlotProgram {
        output: Output::LogProbs,
        normalization: Normalization::Vocabulary,
        constraint: Constraint::Level,
        steps: steps.into(),
    }
}

impl Step {
    fn next_depth(&self) -> usize {
        self.depth + usize::from(matches!(self.choice, Choice::Level(_)))
    }
}

impl SlotProgram {
    /// How many steps the slot takes.
    pub fn num_steps(&self) -> usize {
        self.steps.len()
    }

    /// The tokens that a step chooses from, the levels chosen before it, and the beams it keeps.
    pub fn step(&self, step: usize) -> (StepChoice<'_>, usize, usize) {
        let Step { choice, depth, width } = &self.steps[step];
        let choice = match choice {
            Choice::Level(level) => StepChoice::Level(*level),
            &Choice::Forced { token, is_counted } => StepChoice::Forced { token, is_counted },
            Choice::Tokens(tokens) => StepChoice::Tokens(tokens),
            Choice::Phrase => StepChoice::Phrase,
            &Choice::Sample { num_left } => StepChoice::Sample { num_left },
        };
        (choice, *depth, *width)
    }

    /// Pages of tails. Each position has its own: the start and each step, whether anything reads it
    /// again or not, because a device may keep the beams themselves there. Those of drawn tokens share
    /// pages.
    pub fn tail_pages(&self) -> usize {
        let is_drawn = |step: &&Step| matches!(step.choice, Choice::Sample { .. });
        let widths = self.steps.iter().filter(|step| !is_drawn(step)).map(|step| step.width);
        let drawn = match self.steps.iter().filter(is_drawn).count() {
            0 => 0,
            // One row behind the other, in pages of their own.
            num_rows => 1 + pages::tail_pages([num_rows]),
        };
        pages::tail_pages(std::iter::once(1).chain(widths)) + drawn
    }

    /// Beams of the widest step.
    pub fn max_width(&self) -> usize {
        self.steps.iter().map(|step| step.width).max().unwrap_or(0)
    }

    /// Beams of the widest step; of a slot that draws tokens first, those of an average step, as it has
    /// one beam for most of its time.
    fn typical_width(&self) -> usize {
        let draws = |step: &Step| matches!(step.choice, Choice::Sample { .. });
        match self.steps.first().is_some_and(draws) {
            true => {
                let rows: usize = self.steps.iter().map(|step| step.width).sum();
                rows.div_ceil(self.steps.len())
            }
            false => self.max_width(),
        }
    }

    /// Steps before the first level.
    pub fn num_before_codes(&self) -> usize {
        self.steps.iter().take_while(|step| !matches!(step.choice, Choice::Level(_))).count()
    }

    /// Steps before the first that is part of the score.
    pub fn num_uncounted(&self) -> usize {
        let is_uncounted =
            |step: &&Step| matches!(step.choice, Choice::Forced { is_counted: false, .. });
        self.steps.iter().take_while(is_uncounted).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: PromptKind = PromptKind::Whole { start_token: 0, num_layers: 2 };

    fn read(len: u32) -> Stage {
        Stage::Read((0..len).collect())
    }

    fn forced(tokens: &[u32], is_counted: bool) -> Stage {
        Stage::Forced { tokens: tokens.to_vec(), is_counted }
    }

    fn search(widths: &[usize], count: usize) -> Stage {
        let (normalization, constraint) = (Normalization::Vocabulary, Constraint::Trie);
        let (widths, is_of_phrases) = (widths.to_vec(), false);
        Stage::Search(Search { widths, is_of_phrases, count, normalization, constraint })
    }

    /// The steps of a slot: what it chooses from, the depth, the width.
    fn steps(program: &Program, slot: usize) -> Vec<(StepChoice<'_>, usize, usize)> {
        let slot = &program.slots()[slot];
        (0..slot.num_steps()).map(|step| slot.step(step)).collect()
    }

    #[test]
    fn uncounted_tokens_extend_the_context_of_a_decoder_and_are_steps_behind_an_encoder() {
        let stages = || vec![read(3), forced(&[8, 9], false), search(&[5], 1)];
        let decoder = Program::new(stages(), PromptKind::Chunked);
        assert_eq!(decoder.tokens(), [0, 1, 2, 8, 9]);
        assert_eq!(steps(&decoder, 0), [(StepChoice::Level(0), 0, 5)]);
        let encoder = Program::new(stages(), WHOLE);
        assert_eq!(encoder.tokens(), [0, 1, 2]);
        let uncounted = |token| StepChoice::Forced { token, is_counted: false };
        assert_eq!(
            steps(&encoder, 0),
            [(uncounted(8), 0, 1), (uncounted(9), 0, 1), (StepChoice::Level(0), 0, 5)]
        );
        assert_eq!((encoder.slots()[0].num_uncounted(), encoder.max_steps()), (2, 3));
    }

    #[test]
    fn counted_tokens_are_steps_before_and_after_the_codes() {
        let stages = vec![read(3), forced(&[8], true), search(&[5, 7], 2), forced(&[9], true)];
        let program = Program::new(stages, PromptKind::Chunked);
        assert_eq!((program.tokens(), program.slots().len()), (&[0, 1, 2][..], 2));
        let counted = |token| StepChoice::Forced { token, is_counted: true };
        for slot in 0..2 {
            assert_eq!(
                steps(&program, slot),
                [
                    (counted(8), 0, 1),
                    (StepChoice::Level(0), 0, 5),
                    (StepChoice::Level(1), 1, 7),
                    (counted(9), 2, 7),
                ]
            );
            assert_eq!(program.slots()[slot].num_before_codes(), 1);
            assert_eq!(program.slots()[slot].num_uncounted(), 0);
        }
    }

    #[test]
    fn named_tokens_branch_off_where_they_stand() {
        // Tokens forced after the branch are none that it follows, and none of the shared context.
        let stages =
            vec![read(3), Stage::ReadNamed(vec![6, 7]), forced(&[8], false), search(&[5], 1)];
        let program = Program::new(stages, PromptKind::Chunked);
        assert_eq!(program.tokens(), [0, 1, 2]);
        assert_eq!(steps(&program, 0), [(StepChoice::Tokens(&[6, 7]), 0, 2)]);
        assert_eq!(program.slots()[0].output, Output::LogProbs);
        assert_eq!(steps(&program, 1)[0].0, StepChoice::Forced { token: 8, is_counted: false });
        // Tokens forced before it are followed, and never part of its log-probabilities.
        let stages = vec![read(3), forced(&[8], true), Stage::ReadNamed(vec![6]), search(&[5], 1)];
        let program = Program::new(stages, PromptKind::Chunked);
        let forced = |slot: usize| steps(&program, slot)[0].0;
        assert_eq!(forced(0), StepChoice::Forced { token: 8, is_counted: false });
        assert_eq!(forced(1), StepChoice::Forced { token: 8, is_counted: true });
    }

    #[test]
    fn a_program_leases_its_worst_case() {
        let stages = vec![
            read(60),
            forced(&[1; 5], false),
            Stage::ReadNamed(vec![6, 7]),
            search(&[5, 17], 2),
        ];
        let mut program = Program::new(stages, PromptKind::Chunked);
        let tail_pages = (1 + 1) + 2 * (1 + 1 + 2);
        let needs = Needs { context_pages: 2, tail_pages, beam_rows: 2 + 2 * 17 };
        assert_eq!(program.needs(), needs);
        // A context that a later stage may grow is leased so from the beginning.
        program.context_capacity += 2 * pages::PAGE_LEN;
        assert_eq!(program.needs(), Needs { context_pages: 4, ..needs });
        assert_eq!(program.tokens().len(), 65);
    }
}
