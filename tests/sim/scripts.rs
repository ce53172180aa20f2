//! Worlds that follow a script: one for each fault that was found, and for what chance meets too seldom.
