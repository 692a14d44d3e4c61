//! The numbers of a prompt's words, embedded beside its tokens (P5, Geng et al. 2022).
//!
//! P5 writes items and users as digits, which a tokenizer cuts into pieces. So that the encoder sees
//! which pieces are one item, it adds an embedding of the word's number to that of each token. A
//! word begins at a token whose text begins with `▁`; the end token has number 0, and so have tokens
//! before the first word.

use std::sync::Arc;

use super::config::SidLayout;
use super::weights::Weights;
use crate::backend::{Backend, Batch, Epilogue};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The tensor whose presence says that an encoder has such embeddings.
const NAME: &str = "encoder.whole_word_embeddings.weight";
/// What SentencePiece writes for the space before a word.
const SPACE: char = '\u{2581}';

/// How the tokens of a prompt are counted as words.
#[derive(Debug)]
pub struct WordRule {
    /// By token: whether a word begins with it.
    begins: Vec<bool>,
    end: Option<u32>,
    num_embeddings: usize,
}

/// The embeddings of words by their numbers.
pub(super) struct WholeWords<B: Backend> {
    pub rule: Arc<WordRule>,
    table: B::Table,
    /// Products with it add one buffer to another.
    identity: B::Matrix,
}

impl WordRule {
    /// By token of a prompt: the number of its word.
    fn numbers(&self, prompt: &[u32]) -> Vec<u32> {
        let mut word = 0;
        let mut number = |&token: &u32| {
            word += u32::from(self.begins[token as usize]);
            if self.end == Some(token) { 0 } else { word }
        };
        prompt.iter().map(&mut number).collect()
    }

    /// Checks that the words of a prompt have embeddings.
    ///
    /// # Errors
    /// [`Error::LimitExceeded`].
    pub fn check(&self, prompt: &[u32]) -> Result<()> {
        let len = self.numbers(prompt).into_iter().max().unwrap_or(0) as usize;
        let max = self.num_embeddings - 1;
        match len > max {
            true => Err(Error::LimitExceeded { what: "words of the prompt", len, max }),
            false => Ok(()),
        }
    }
}

impl<B: Backend> WholeWords<B> {
    /// The embeddings of a checkpoint that has some.
    ///
    /// # Errors
    /// Those of the tensor; those of the tokenizer's files, which say where words begin.
    pub fn take(
        backend: &B,
        weights: &mut Weights,
        layout: &SidLayout,
        end: Option<u32>,
        [vocab_size, d_model]: [usize; 2],
    ) -> Result<Option<WholeWords<B>>> {
        let Some(num_embeddings) = weights.num_rows(NAME) else { return Ok(None) };
        let table = weights.take(NAME, &[num_embeddings, d_model])?;
        let begins = |token: usize| {
            let text = layout.vocabulary.text(token as u32)?;
            Ok(text.is_some_and(|text| text.starts_with(SPACE)))
        };
        let begins = (0..vocab_size).map(begins).collect::<Result<Vec<bool>>>()?;
        let mut identity = vec![0.0; d_model * d_model];
        identity.iter_mut().step_by(d_model + 1).for_each(|number| *number = 1.0);
        Ok(Some(WholeWords {
            rule: Arc::new(WordRule { begins, end, num_embeddings }),
            table: backend.table(table, None)?,
            identity: backend.matrix(&[Tensor::new(&[d_model, d_model], identity)])?,
        }))
    }

    /// Adds the embeddings of words to those of tokens: the batch's rows of prompts, of which `prompts`
    /// holds all tokens, prompt after prompt.
    pub fn add(
        &self,
        backend: &B,
        prompts: &[u32],
        batch: &Batch<'_, B>,
        spare: &mut B::Buffer,
        residual: &mut B::Buffer,
    ) {
        let mut numbers = Vec::with_capacity(prompts.len());
        let mut rest = prompts;
        for chunk in batch.chunks {
            // A piece of one prompt has a part of its rows.
            let len = if batch.chunks.len() == 1 { rest.len() } else { chunk.len() };
            let of_prompt = self.rule.numbers(&rest[..len]);
            rest = &rest[len..];
            numbers.extend_from_slice(&of_prompt[chunk.clone()]);
        }
        backend.embed(&self.table, &numbers, batch, spare);
        backend.matmul(spare, &self.identity, None, Epilogue::Add, residual);
    }
}
