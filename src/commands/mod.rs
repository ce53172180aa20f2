//! What the program does besides serving: check a configuration, mint and explain tokens, follow a stream.

pub mod certificates;
pub mod check;
pub mod explain;
pub mod explain_url;
pub mod token;
pub mod watch;
