//! Tests of the command. They run the real binary; one program, so that it links once.

mod bad_input;
mod channels;
mod common;
mod data;
mod first_hour;
#[cfg(feature = "mpi")]
mod mpi;
mod page;
mod runs;
mod shards;
mod sounds;
mod style;
mod tutorial;
mod using;
