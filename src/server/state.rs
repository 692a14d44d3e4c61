//! What all calls of a server share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

use super::access::Access;
use super::door::DoorMetrics;
use super::models::Models;
use super::options::Limits;
use crate::wire::RequestDefaults;

/// What all calls of a server share.
pub(super) struct State {
    pub models: Models,
    pub access: Access,
    pub limits: Limits,
    pub defaults: RequestDefaults,
    pub metrics: DoorMetrics,
    pub started: Instant,
    pub started_at: SystemTime,
    is_draining: AtomicBool,
}

impl State {
    pub fn new(models: Models, access: Access, limits: Limits, defaults: RequestDefaults) -> State {
        State {
            models,
            access,
            limits,
            defaults,
            metrics: DoorMetrics::default(),
            started: Instant::now(),
            started_at: SystemTime::now(),
            is_draining: AtomicBool::new(false),
        }
    }

    /// Whether the server takes no new requests.
    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Acquire)
    }

    pub fn drain(&self) {
        self.is_draining.store(true, Ordering::Release);
    }

    /// Whether requests should be sent here.
    pub fn is_ready(&self) -> bool {
        !self.is_draining() && self.models.are_ready()
    }
}
