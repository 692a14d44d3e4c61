//! Page-locked memory of the host, from which the device copies while the host goes on.
#![allow(unsafe_code)] // the driver's interface

use cudarc::driver::DriverError;
use cudarc::driver::result as driver;
use cudarc::driver::sys;

use super::driver::Address;
use super::staging::{Copies, Ring};

/// Page-locked memory of the host, from which the device copies while the host goes on.
pub(super) struct Pinned {
    memory: *mut u8,
    ring: Ring<sys::CUevent>,
}

impl Pinned {
    /// # Errors
    /// The driver's.
    pub fn new(len: usize) -> std::result::Result<Pinned, DriverError> {
        // SAFETY: it is freed when this is dropped.
        let memory = unsafe { driver::malloc_host(len, 0)? }.cast();
        Ok(Pinned { memory, ring: Ring::new(len) })
    }

    /// Copies to the device in the order of a stream; `bytes` are read before this returns.
    ///
    /// # Errors
    /// The driver's. Everything on its way has been waited for then.
    pub fn upload(
        &mut self,
        to: Address,
        bytes: &[u8],
        stream: sys::CUstream,
    ) -> std::result::Result<(), DriverError> {
        let copies = CopiesTo { to, memory: self.memory, stream };
        self.ring.send(bytes, &copies)
    }
}

/// Copies from page-locked memory to a place on the device, in the order of a stream.
struct CopiesTo {
    to: Address,
    memory: *mut u8,
    stream: sys::CUstream,
}

impl Copies for CopiesTo {
    type Ticket = sys::CUevent;
    type Error = DriverError;

    fn copy(&self, part: &[u8], at: usize, to: usize) -> std::result::Result<(), DriverError> {
        // SAFETY: the ring says that the stretch lies within the memory, and that nobody uses it
        // until the event behind the copy has happened. The backend allocated what is copied to.
        unsafe {
            let staged = std::slice::from_raw_parts_mut(self.memory.add(at), part.len());
            staged.copy_from_slice(part);
            driver::memcpy_htod_async(self.to.offset(to).get(), staged, self.stream)
        }
    }

    fn mark(&self) -> std::result::Result<sys::CUevent, DriverError> {
        let event = driver::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
        // SAFETY: the event was just created. One that was not recorded would count as arrived.
        unsafe { driver::event::record(event, self.stream) }.inspect_err(|_| self.forget(event))?;
        Ok(event)
    }

    fn wait(&self, event: sys::CUevent) -> std::result::Result<(), DriverError> {
        // SAFETY: the event was recorded, and is waited for once.
        unsafe {
            let waited = driver::event::synchronize(event);
            waited.and(driver::event::destroy(event))
        }
    }

    fn forget(&self, event: sys::CUevent) {
        // SAFETY: the event is ours; errors here have nowhere to go.
        let _ = unsafe { driver::event::destroy(event) };
    }

    fn wait_for_all(&self) -> std::result::Result<(), DriverError> {
        // SAFETY: the stream is the device's.
        unsafe { driver::stream::synchronize(self.stream) }
    }
}

impl Drop for Pinned {
    /// Its context must be current, and no copy may be on its way.
    fn drop(&mut self) {
        // SAFETY: all of it is ours; errors here have nowhere to go.
        unsafe {
            for event in self.ring.drain() {
                let _ = driver::event::destroy(event);
            }
            let _ = driver::free_host(self.memory.cast());
        }
    }
}
