//! One process of a job that `mpirun` started: its rank, its share of the machine, and the end of
//! the whole job when one rank fails.

use std::{panic::AssertUnwindSafe, process::ExitCode};

use byol::{ranks::Ranks, train};

use crate::terminal::{self, Result};

/// This process within its job; a job of one process without MPI.
pub struct MpiJob {
    /// Data-parallel ranks.
    pub ranks: Ranks,
    /// Rank among the job's processes on this machine, and their number.
    pub local: [usize; 2],
    #[cfg(feature = "mpi")]
    session: Option<byol::ranks::mpi::Session>,
}

/// Number of processes a launcher has started together, if any.
fn launched_processes() -> Option<usize> {
    let size = |name: &&str| std::env::var(name).ok()?.parse().ok();
    ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"].iter().find_map(size)
}

/// Refuses to do the same work in several processes.
pub fn require_single_process() -> Result<()> {
    match launched_processes() {
        Some(n) if n > 1 => Err(format!(
            "{n} processes were started together, but only `pretrain` and `resume` share their work\n\
             hint: start this command without `mpirun`"
        )
        .into()),
        _ => Ok(()),
    }
}

/// Joins the job, runs `work` in it, and ends all ranks if one fails.
pub fn run(work: impl FnOnce(&MpiJob) -> Result<ExitCode>) -> Result<ExitCode> {
    let job = join()?;
    let ranks = job.ranks;
    terminal::set_ranks(ranks);
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| check_same_program(ranks).and_then(|()| work(&job))));
    let outcome = match outcome {
        Ok(outcome) => outcome,
        // The other ranks would wait for this one. A lost device is reported by a panic.
        Err(_) if ranks != Ranks::SINGLE => job.abort(),
        Err(panic) => std::panic::resume_unwind(panic),
    };
    let Err(error) = outcome else { return outcome };
    if ranks == Ranks::SINGLE {
        return Err(error);
    }
    let known_to_all = error.downcast_ref::<train::Error>().is_some_and(train::Error::is_collective);
    // Printed before this rank leaves MPI, where ranks wait for each other: the launcher ends all
    // of them when the first exits with a failure.
    if ranks.is_root() || !known_to_all {
        terminal::error(&*error);
    }
    if !known_to_all {
        job.abort();
    }
    Ok(ExitCode::FAILURE)
}

fn check_same_program(ranks: Ranks) -> Result<()> {
    if ranks == Ranks::SINGLE {
        return Ok(());
    }
    let own = std::env::current_exe().map_err(|e| format!("cannot find the path of this program: {e}"))?;
    let own = byol::nn::weights::sha256(&own)?;
    match ranks.first_mismatch(own.as_bytes()) {
        None => Ok(()),
        Some(rank) => Err(train::Error::OtherRank {
            rank,
            what: "a different program".into(),
            remedy: "install the same byol on all machines",
        }
        .into()),
    }
}

#[cfg(not(feature = "mpi"))]
fn join() -> Result<MpiJob> {
    match launched_processes() {
        Some(n) if n > 1 => Err(format!(
            "{n} processes were started together, but this byol was built without MPI\n\
             hint: build it with `--features mpi`, or start it without `mpirun`"
        )
        .into()),
        _ => Ok(MpiJob { ranks: Ranks::SINGLE, local: [0, 1] }),
    }
}

#[cfg(feature = "mpi")]
fn join() -> Result<MpiJob> {
    // Slurm with PMIx sets no size; a process without a launcher needs no MPI.
    if launched_processes().is_none() && std::env::var_os("PMIX_RANK").is_none() {
        return Ok(MpiJob { ranks: Ranks::SINGLE, local: [0, 1], session: None });
    }
    let session = byol::ranks::mpi::Session::start().ok_or(
        "the MPI library does not support calls from several threads\n\
         hint: use one that provides MPI_THREAD_SERIALIZED",
    )?;
    session.watch(rank_timeout()?, |waited| {
        let waited = terminal::duration(waited.as_secs_f64());
        print_error(&format!(
            "this rank has waited {waited} for the others: a rank hangs or has died\n\
             hint: continue with `byol resume`; BYOL_RANK_TIMEOUT sets the time limit in seconds"
        ));
        mpi_abort();
    });
    let _ = WAITING.set(Box::new(session.waiting()));
    Ok(MpiJob { ranks: session.ranks, local: session.local, session: Some(session) })
}

/// Time after which a rank that waits for the others gives up.
#[cfg(feature = "mpi")]
fn rank_timeout() -> Result<std::time::Duration> {
    let seconds =
        match std::env::var("BYOL_RANK_TIMEOUT") {
            Err(_) => 1800.0,
            Ok(text) => text.parse().ok().filter(|s: &f64| (1.0..1e9).contains(s)).ok_or_else(|| {
                format!("invalid BYOL_RANK_TIMEOUT `{text}` (expected a number of seconds, at least 1)")
            })?,
        };
    Ok(std::time::Duration::from_secs_f64(seconds))
}

#[cfg(feature = "mpi")]
fn print_error(text: &str) {
    terminal::error(&*Box::<dyn std::error::Error>::from(text));
}

#[cfg(feature = "mpi")]
type Waiting = Box<dyn Fn() -> Option<std::time::Duration> + Send + Sync>;

/// Time this rank has been waiting for the others; `None` if it is not.
#[cfg(feature = "mpi")]
static WAITING: std::sync::OnceLock<Waiting> = std::sync::OnceLock::new();

/// Called on a signal. A launcher sends one when a rank has died; a rank that waits for the others
/// then explains why the job ends, and exits.
pub fn exit_if_ranks_were_lost() {
    #[cfg(feature = "mpi")]
    if let Some(waiting) = WAITING.get() {
        let patience = std::time::Duration::from_millis(300);
        std::thread::sleep(patience);
        if waiting().is_some_and(|waited| waited >= patience) {
            print_error(
                "the job was terminated while this rank waited for the others: a rank died or was stopped\n\
                 hint: continue from the last checkpoint with `byol resume`",
            );
            std::process::exit(1);
        }
    }
}

#[cfg(feature = "mpi")]
fn mpi_abort() -> ! {
    byol::ranks::mpi::abort(1)
}

impl MpiJob {
    /// Number of threads of this process: the requested number, or its share of the cores if 0.
    pub fn threads(&self, requested: usize) -> usize {
        let machine = byol::device::machine();
        match requested {
            // The launcher may have bound each process to its own cores.
            0 if byol::device::is_bound() => machine.cores,
            0 => (machine.cores / self.local[1]).max(1),
            n => n,
        }
    }

    /// Prints the communication volume and time per step.
    pub fn print_comm_stats(&self, steps: u64, seconds: f64) {
        let stats = self.ranks.comm_stats();
        if self.ranks != Ranks::SINGLE && steps > 0 {
            let per_step = |total: f64| total / steps as f64;
            terminal::note(format!(
                "{} ranks: communication per rank {:.2} MB, {:.0} messages, {:.1} ms of a {:.1} ms step",
                self.ranks.world_size(),
                per_step(stats.bytes as f64) / 1e6,
                per_step(stats.messages as f64),
                1e3 * per_step(stats.seconds),
                1e3 * per_step(seconds),
            ));
        }
    }

    fn abort(&self) -> ! {
        #[cfg(feature = "mpi")]
        if self.session.is_some() {
            mpi_abort();
        }
        std::process::exit(1)
    }
}
