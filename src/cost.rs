//! How long work takes: an estimate that learns from every step.
//!
//! The time of a step is taken to be linear in what it does: a constant, a rate for each prompt token
//! and a rate for each beam row. The rates fit the steps so far by least squares of the relative error,
//! where older steps count less (exponential forgetting), and none is below zero.
//!
//! A machine may change within a few steps: a neighbour takes its caches, a clock drops. So one factor
//! over all rates follows the last few steps. A single slow step moves it by a bounded amount.
//!
//! No clock is read here.

/// A moment, in microseconds since the engine was opened, or a time.
pub type Micros = u64;

/// What the time of a step, or of several, depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// How many steps.
    pub steps: usize,
    /// Prompt tokens that they read.
    pub prompt_tokens: usize,
    /// Beam rows that they extend.
    pub beam_rows: usize,
}

impl Work {
    fn quantities(self) -> [f64; 3] {
        [self.steps as f64, self.prompt_tokens as f64, self.beam_rows as f64]
    }
}

impl std::ops::AddAssign for Work {
    fn add_assign(&mut self, other: Work) {
        self.steps += other.steps;
        self.prompt_tokens += other.prompt_tokens;
        self.beam_rows += other.beam_rows;
    }
}

/// The weight of a step in the fit when the next one comes: about 100 steps count.
const REMEMBERED: f64 = 0.99;
/// The weight of a step in the factor when the next one comes: about four steps count.
const FOLLOWED: f64 = 0.75;
/// How much of the factor is taken out of a step's time before the rates are fitted to it. The rest
/// lets them follow a change that stays.
const ABSORBED: f64 = 0.9;
/// Steps before the rates are believed.
const LEAST_OBSERVED: u32 = 8;
/// The most that one step may seem slower than expected.
const MOST_SURPRISE: f64 = 8.0;
/// Keeps rates apart that the steps so far cannot tell apart, as a share of their own evidence.
const RIDGE: f64 = 1e-3;

/// The time that steps take, in microseconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct CostModel {
    /// Sums over steps of products of quantities, each divided by the step's time.
    products: [[f64; 3]; 3],
    /// Sums over steps of quantities, each divided by the step's time.
    sums: [f64; 3],
    /// Of a step, a prompt token, a beam row.
    rates: [f64; 3],
    /// What the last steps took, and what the rates say of them.
    recent_us: f64,
    recent_expected_us: f64,
    num_observed: u32,
}

impl CostModel {
    /// Takes note of work that was done.
    pub fn observe(&mut self, work: Work, took_us: Micros) {
        let (quantities, expected) = (work.quantities(), self.expected_us(work));
        let mut took = took_us.max(1) as f64;
        self.num_observed = self.num_observed.saturating_add(1);
        if self.is_known() {
            let followed = took.min(MOST_SURPRISE * expected * self.slowdown());
            self.recent_us = FOLLOWED * self.recent_us + followed;
            self.recent_expected_us = FOLLOWED * self.recent_expected_us + expected;
            // The rates are those of the machine as it mostly is.
            took /= self.slowdown().powf(ABSORBED);
        }
        for (row, &x) in quantities.iter().enumerate() {
            self.sums[row] = REMEMBERED * self.sums[row] + x / took;
            for (column, &y) in quantities.iter().enumerate() {
                let product = &mut self.products[row][column];
                *product = REMEMBERED * *product + x / took * y / took;
            }
        }
        self.rates = self.fit();
    }

    /// How long work will take as the machine is now; zero before enough was observed.
    pub fn predict_us(&self, work: Work) -> Micros {
        match self.is_known() {
            true => (self.expected_us(work) * self.slowdown()).ceil() as Micros,
            false => 0,
        }
    }

    /// Whether steps of several kinds were observed, so that rates can be told apart.
    fn is_known(&self) -> bool {
        self.num_observed > LEAST_OBSERVED
    }

    /// Prompt tokens that take so long, beside what a step takes in any case. None where the rate
    /// of a token is not known.
    pub fn tokens_within(&self, us: f64) -> Option<usize> {
        let rate = self.rates[1] * self.slowdown();
        (rate > 0.0 && self.is_known()).then(|| (us / rate) as usize)
    }

    fn expected_us(&self, work: Work) -> f64 {
        self.rates.iter().zip(work.quantities()).map(|(rate, quantity)| rate * quantity).sum()
    }

    /// How much slower the last steps were than the rates say.
    fn slowdown(&self) -> f64 {
        match self.recent_expected_us > 0.0 {
            true => self.recent_us / self.recent_expected_us,
            false => 1.0,
        }
    }

    /// The best rates, none below zero: those of the best subset of quantities whose own best rates
    /// are positive (with three quantities, all seven are tried).
    fn fit(&self) -> [f64; 3] {
        let error = |rates: &[f64; 3]| -> f64 {
            let product = |row: usize| -> f64 {
                self.products[row].iter().zip(rates).map(|(product, rate)| product * rate).sum()
            };
            (0..3).map(|row| rates[row] * (product(row) - 2.0 * self.sums[row])).sum()
        };
        let subsets = (1..8u8).filter_map(|subset| self.fit_subset(subset));
        let best = subsets.min_by(|a, b| error(a).total_cmp(&error(b)));
        best.unwrap_or(self.rates)
    }

    /// The best rates of some quantities by Gaussian elimination, where all are positive.
    fn fit_subset(&self, subset: u8) -> Option<[f64; 3]> {
        let of: Vec<usize> = (0..3).filter(|index| subset & (1 << index) != 0).collect();
        let mut rows: Vec<Vec<f64>> = of
            .iter()
            .map(|&row| {
                let mut values: Vec<f64> = of.iter().map(|&c| self.products[row][c]).collect();
                values.push(self.sums[row]);
                values
            })
            .collect();
        for (at, row) in rows.iter_mut().enumerate() {
            row[at] *= 1.0 + RIDGE;
        }
        for at in 0..of.len() {
            let pivot = rows[at].clone();
            // A quantity that no step had.
            if pivot[at] <= 0.0 {
                return None;
            }
            for (_, row) in rows.iter_mut().enumerate().filter(|(other, _)| *other != at) {
                let times = row[at] / pivot[at];
                row.iter_mut().zip(&pivot).for_each(|(value, pivot)| *value -= times * pivot);
            }
        }
        let mut rates = [0.0; 3];
        for (at, &index) in of.iter().enumerate() {
            rates[index] = rows[at][of.len()] / rows[at][at];
            if rates[index].is_nan() || rates[index] <= 0.0 {
                return None;
            }
        }
        Some(rates)
    }
}

/// The median of what is noted, followed in steps of a tenth.
#[derive(Debug, Clone, Copy, Default)]
struct Median(f64);

impl Median {
    fn note(&mut self, value: f64) {
        self.0 = match self.0 {
            0.0 => value,
            median if value > median => value.min(median * 1.1),
            median => value.max(median / 1.1),
        };
    }
}

/// What is believed of a request's future, and of requests as they usually are.
#[derive(Debug, Clone, Copy)]
pub struct Estimate {
    /// How long work takes.
    pub cost: CostModel,
    /// Nine of ten requests take at most so many times as long as was forecast.
    margin: f64,
    /// What a request takes alone, in microseconds.
    alone_us: Median,
    /// Prompt tokens that a request has to read.
    unread: Median,
    /// The share of requests with deadlines that are refused behind others, lately.
    pressure: f64,
}

/// The least and the most that forecasts are stretched by. More than twice would be no forecast.
const MARGINS: (f64, f64) = (1.1, 2.0);

impl Default for Estimate {
    fn default() -> Estimate {
        let cost = CostModel::default();
        let (alone_us, unread) = (Median::default(), Median::default());
        Estimate { cost, margin: MARGINS.0, alone_us, unread, pressure: 0.0 }
    }
}

impl Estimate {
    /// A time that was forecast, with what forecasts have been short by.
    pub fn stretched_us(&self, forecast_us: Micros) -> Micros {
        (forecast_us as f64 * self.margin) as Micros
    }

    /// Takes note of a request that was forecast to take so long and took so long, or was abandoned
    /// after it.
    pub fn note_request(&mut self, forecast_us: Micros, took_us: Micros) {
        if forecast_us == 0 {
            return; // nothing was known
        }
        let is_short = took_us > self.stretched_us(forecast_us);
        let step = if is_short { 1.09 } else { 0.99 };
        self.margin = (self.margin * step).clamp(MARGINS.0, MARGINS.1);
    }

    /// Takes note of whether a request was refused behind others when it came.
    pub fn note_judged(&mut self, is_refused: bool) {
        let share = f64::from(u8::from(is_refused));
        self.pressure += (share - self.pressure) / 64.0;
    }

    /// Whether a request that takes so long alone is too costly while others are refused. One that
    /// takes `n` times as long as the typical is taken in once where `n` typical ones are, at most:
    /// what can be done is shared by work. `id` draws.
    pub fn is_too_costly(&self, alone_us: Micros, id: u64) -> bool {
        let times = alone_us as f64 / self.alone_us.0.max(1.0);
        let refused = self.pressure * (1.0 - 1.0 / times);
        // Equidistributed: multiples of the golden ratio.
        let drawn = (id.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11) as f64 / (1u64 << 53) as f64;
        self.alone_us.0 > 0.0 && drawn < refused
    }

    /// Takes note of a request that begins, by what it will take alone.
    pub fn note_admitted(&mut self, alone: Work) {
        self.unread.note(alone.prompt_tokens.max(1) as f64);
        self.alone_us.note(self.cost.predict_us(alone) as f64);
    }

    /// How prompts share steps.
    pub fn pace(&self) -> Pace {
        let within = |share: f64| match self.cost.tokens_within(share * self.alone_us.0) {
            Some(tokens) if self.alone_us.0 > 0.0 => tokens.max(LEAST_TOKENS),
            _ => usize::MAX,
        };
        Pace {
            short: (2.0 * self.unread.0) as usize,
            beside_others: within(1.0 / 8.0),
            alone: within(1.0 / 2.0),
        }
    }
}

/// Prompt tokens below which a part of a prompt is not worth a step: products of fewer rows take
/// nearly as long.
const LEAST_TOKENS: usize = 16;

/// How prompts share steps, in tokens. A typical request is the median of those that were admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// A prompt with more left is a long one: twice the typical.
    pub short: usize,
    /// What a long prompt reads in a step that others take part in: an eighth of the time of a
    /// typical request, so that its few steps take about half as long again.
    pub beside_others: usize,
    /// What it reads in a step of its own: half of that time, which a request that comes meanwhile
    /// waits for.
    pub alone: usize,
}

impl Pace {
    /// Prompts share a step without regard to their lengths.
    pub const UNBOUNDED: Pace =
        Pace { short: usize::MAX, beside_others: usize::MAX, alone: usize::MAX };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(prompt_tokens: usize, beam_rows: usize) -> Work {
        Work { steps: 1, prompt_tokens, beam_rows }
    }

    /// Random steps whose times are 300 + 20 a token + 7 a row, times a factor and up to a third of
    /// noise.
    fn run(model: &mut CostModel, rng: &mut fastrand::Rng, steps: usize, factor: f64) {
        for _ in 0..steps {
            let work = work(rng.usize(0..3) * rng.usize(0..200), rng.usize(0..200));
            let exact = 300.0 + 20.0 * work.prompt_tokens as f64 + 7.0 * work.beam_rows as f64;
            model.observe(work, (factor * exact * (0.85 + rng.f64() * 0.35)) as Micros);
        }
    }

    fn ratio(model: &CostModel, work: Work, exact: f64) -> f64 {
        model.predict_us(work) as f64 / exact
    }

    #[test]
    fn rates_are_learned_from_mixed_steps_and_a_change_of_speed_is_followed_in_a_few() {
        for seed in 0..20 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut model = CostModel::default();
            assert_eq!(model.predict_us(work(100, 100)), 0, "nothing is known");
            run(&mut model, &mut rng, 60, 1.0);
            let cases =
                [(work(500, 0), 10_300.0), (work(0, 200), 1_700.0), (work(30, 90), 1_530.0)];
            for (work, exact) in cases {
                let found = ratio(&model, work, exact);
                assert!((0.7..1.4).contains(&found), "seed {seed}: {work:?} {found} {model:?}");
            }
            for (factor, steps) in [(5.0, 8), (1.0, 16), (0.2, 16)] {
                run(&mut model, &mut rng, steps, factor);
                let found = ratio(&model, work(100, 100), factor * 3_000.0);
                assert!((0.6..1.6).contains(&found), "seed {seed}: {factor} {found} {model:?}");
            }
        }
    }

    #[test]
    fn one_slow_step_moves_predictions_by_a_bounded_amount() {
        let (mut rng, mut model) = (fastrand::Rng::with_seed(1), CostModel::default());
        run(&mut model, &mut rng, 60, 1.0);
        model.observe(work(50, 50), 10_000_000);
        assert!(ratio(&model, work(100, 100), 3_000.0) < 4.0, "{model:?}");
        run(&mut model, &mut rng, 12, 1.0);
        assert!(ratio(&model, work(100, 100), 3_000.0) < 1.5, "{model:?}");
    }

    #[test]
    fn steps_of_one_kind_alone_are_predicted_too() {
        let mut model = CostModel::default();
        for _ in 0..50 {
            model.observe(work(40, 40), 2_000);
        }
        let found = ratio(&model, work(40, 40), 2_000.0);
        assert!((0.95..1.05).contains(&found), "{found} {model:?}");
        let several = Work { steps: 10, prompt_tokens: 400, beam_rows: 400 };
        assert!((19_000..21_000).contains(&model.predict_us(several)), "{model:?}");
    }

    #[test]
    fn a_margin_covers_nine_of_ten_and_has_limits() {
        let mut estimate = Estimate::default();
        assert_eq!(estimate.stretched_us(1000), 1100);
        let mut rng = fastrand::Rng::with_seed(1);
        (0..3000).for_each(|_| estimate.note_request(1000, 1000 + rng.u64(0..600)));
        let stretched = estimate.stretched_us(1000);
        assert!((1_400..1_700).contains(&stretched), "{stretched}");
        (0..100).for_each(|_| estimate.note_request(1000, 100_000));
        assert_eq!(estimate.stretched_us(1000), 2000);
        (0..100).for_each(|_| estimate.note_request(1000, 10));
        assert_eq!(estimate.stretched_us(1000), 1100);
    }

    #[test]
    fn costly_requests_are_taken_in_less_often_while_others_are_refused() {
        let mut estimate = Estimate::default();
        run(&mut estimate.cost, &mut fastrand::Rng::with_seed(1), 100, 1.0);
        let typical = Work { steps: 4, prompt_tokens: 100, beam_rows: 100 };
        (0..100).for_each(|_| estimate.note_admitted(typical));
        let alone_us = estimate.cost.predict_us(typical);
        let costly = |estimate: &Estimate, times: u64| {
            (0..1000).filter(|&id| estimate.is_too_costly(times * alone_us, id)).count()
        };
        assert_eq!(costly(&estimate, 10), 0, "nobody is refused");
        (0..1000).for_each(|request| estimate.note_judged(request % 4 != 0));
        assert_eq!(costly(&estimate, 1), 0, "it is typical");
        assert!((650..700).contains(&costly(&estimate, 10)), "{}", costly(&estimate, 10));
        (0..1000).for_each(|_| estimate.note_judged(false));
        assert_eq!(costly(&estimate, 10), 0);
    }

    #[test]
    fn a_long_prompt_gets_a_share_of_the_time_of_a_typical_request() {
        let mut estimate = Estimate::default();
        assert_eq!(estimate.pace().beside_others, usize::MAX, "nothing is known");
        let mut rng = fastrand::Rng::with_seed(1);
        run(&mut estimate.cost, &mut rng, 100, 1.0);
        for request in 0..200 {
            let unread = if request % 20 == 19 { 1000 } else { 100 };
            estimate.note_admitted(Work { steps: 4, prompt_tokens: unread, beam_rows: 100 });
        }
        // 3.9 ms: an eighth is 24 tokens, a half 97.
        let Pace { short, beside_others, alone } = estimate.pace();
        assert!((160..260).contains(&short), "{short}");
        assert!((16..32).contains(&beside_others), "{beside_others}");
        assert!((70..130).contains(&alone), "{alone}");
    }
}
