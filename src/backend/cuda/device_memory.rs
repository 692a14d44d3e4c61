//! Memory of a device, owned by who asked for it.

use std::sync::Arc;

use bytemuck::Pod;

use super::device::Device;
use super::driver::{Address, Driver};
use crate::error::Result;

/// Bytes that memory which is written often has at least.
const LEAST_OFTEN_WRITTEN: usize = 64 << 10;

/// Memory of a device, freed when dropped.
pub(super) struct DeviceMemory<D: Driver> {
    device: Arc<Device<D>>,
    address: Address,
    bytes: usize,
    name: &'static str,
    /// Whether graphs may hold its address.
    is_in_graphs: bool,
}

impl<D: Driver> DeviceMemory<D> {
    /// No memory yet.
    pub fn none(device: &Arc<Device<D>>, name: &'static str) -> DeviceMemory<D> {
        let device = Arc::clone(device);
        DeviceMemory { device, address: Address(0), bytes: 0, name, is_in_graphs: true }
    }

    /// A copy of these values, made beside the work.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device); where there is no memory, the device goes on.
    pub fn of<T: Pod>(
        device: &Arc<Device<D>>,
        values: &[T],
        name: &'static str,
    ) -> Result<DeviceMemory<D>> {
        let mut memory = DeviceMemory::none(device, name);
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if !bytes.is_empty() {
            memory.allocate(bytes.len())?;
            device.upload_beside(memory.address, bytes)?;
        }
        Ok(memory)
    }

    /// A copy of these values, made beside the work, whose address steps read from metadata: graphs
    /// do not refer to it. For catalogs and filters, which come and go while requests run.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device); where there is no memory, the device goes on.
    pub fn outside_graphs<T: Pod>(
        device: &Arc<Device<D>>,
        values: &[T],
        name: &'static str,
    ) -> Result<DeviceMemory<D>> {
        let mut memory = DeviceMemory::of(device, values, name)?;
        memory.is_in_graphs = false;
        Ok(memory)
    }

    /// Makes room for `bytes`; values are lost where it has to grow. Where there is no memory, the
    /// step fails; a capture ends instead of growing it.
    pub fn reserve(&mut self, bytes: usize) {
        if bytes > self.bytes
            && self.device.may_allocate()
            && let Err(error) = self.allocate(bytes)
        {
            self.device.fail_step(error);
        }
    }

    /// Takes memory of `bytes`; values are lost.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device); where there is no memory, the device goes on.
    pub fn allocate(&mut self, bytes: usize) -> Result<()> {
        self.release();
        if bytes > 0 {
            (self.address, self.bytes) = (self.device.allocate(bytes, self.name)?, bytes);
        }
        Ok(())
    }

    /// Becomes a copy of these values.
    pub fn write<T: Pod>(&mut self, values: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        self.reserve(bytes.len());
        if self.bytes >= bytes.len() {
            self.device.upload(self.address, bytes);
        }
    }

    /// Becomes a copy of values that are written in every pass: grows in leaps, so that it soon
    /// grows no more.
    pub fn write_often<T: Pod>(&mut self, values: &[T]) {
        self.reserve_often(size_of_val(values));
        self.write(values);
    }

    /// Takes the least memory of what every pass writes.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device); where there is no memory, the device goes on.
    pub fn allocate_often(&mut self) -> Result<()> {
        self.allocate(LEAST_OFTEN_WRITTEN)
    }

    /// Makes room for what every pass needs: grows in leaps.
    pub fn reserve_often(&mut self, bytes: usize) {
        if bytes > self.bytes {
            self.reserve(bytes.next_power_of_two().max(LEAST_OFTEN_WRITTEN));
        }
    }

    /// Waits for the device and copies the first values.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    pub fn read<T: Pod>(&self, values: &mut [T]) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        self.device.check()?;
        assert!(bytes.len() <= self.bytes, "values that are read must lie within the memory");
        self.device.download(self.address, bytes)
    }

    pub fn address(&self) -> Address {
        self.address
    }

    /// The address `offset` bytes on, as kernels take it.
    pub fn at(&self, offset: usize) -> u64 {
        self.address_at(offset).get()
    }

    /// The address `offset` bytes on, as products take it.
    pub fn address_at(&self, offset: usize) -> Address {
        self.address.offset(offset)
    }

    fn release(&mut self) {
        if self.bytes > 0 {
            self.device.free(self.address, self.bytes, self.is_in_graphs);
            (self.address, self.bytes) = (Address(0), 0);
        }
    }
}

impl<D: Driver> Drop for DeviceMemory<D> {
    fn drop(&mut self) {
        self.release();
    }
}
