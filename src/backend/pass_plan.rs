//! What a device plans before it works on a batch.

/// What a device plans for the rows of a batch before it works on them: nothing by default.
pub trait PassPlan: Default + Clone + Send {
    /// The pass over a batch's prompts alone, which is not planned yet.
    fn of_prompts(&self) -> Self;
    /// The pass over some of a batch's slots, with rows of beams alone, which is not planned yet.
    fn of_beams(&self) -> Self;
}

/// A device that plans nothing.
impl PassPlan for () {
    fn of_prompts(&self) {}

    fn of_beams(&self) {}
}
