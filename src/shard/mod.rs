//! One core's state.
pub mod topics;
pub mod wheel;
