//! One process of several that `mpirun` has started: which it is, what it leaves to the first, and how all end when one fails.

use std::{panic::AssertUnwindSafe, process::ExitCode};

use byol::{ranks::Ranks, train};

use crate::report::{self, Result};

/// What this process is of the job.
pub struct Joined {
    /// Who shares the work.
    pub ranks: Ranks,
    /// Which of this machine's processes of the job, and how many they are.
    pub local: [usize; 2],
    #[cfg(feature = "mpi")]
    session: Option<byol::ranks::mpi::Session>,
}

/// How many processes a launcher has started together, if one has.
fn launched() -> Option<usize> {
    let size = |name: &&str| std::env::var(name).ok()?.parse().ok();
    ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"].iter().find_map(size)
}

/// Refuses to do the same work several times over.
pub fn must_be_alone() -> Result<()> {
    match launched() {
        Some(n) if n > 1 => Err(format!(
            "{n} processes were started together, which only pretrain and resume share; start it without mpirun"
        )
        .into()),
        _ => Ok(()),
    }
}

/// Joins the other processes of the job, does the work with them, and ends all where one fails.
pub fn together(work: impl FnOnce(&Joined) -> Result<ExitCode>) -> Result<ExitCode> {
    let joined = join()?;
    let ranks = joined.ranks;
    report::tell_as(ranks);
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| same_program(ranks).and_then(|()| work(&joined))));
    let outcome = match outcome {
        Ok(outcome) => outcome,
        // The others would wait for this one: a device that is lost says so by a panic.
        Err(_) if ranks != Ranks::ALONE => joined.abort(),
        Err(panic) => std::panic::resume_unwind(panic),
    };
    let Err(error) = outcome else { return outcome };
    if ranks == Ranks::ALONE {
        return Err(error);
    }
    let known_to_all = error.downcast_ref::<train::Error>().is_some_and(train::Error::is_of_all_ranks);
    // Said before this rank leaves MPI, for which the ranks wait for each other: at the first that ends with a failure the launcher ends them all.
    if ranks.leads() || !known_to_all {
        report::error(&*error);
    }
    if !known_to_all {
        joined.abort();
    }
    Ok(ExitCode::FAILURE)
}

fn same_program(ranks: Ranks) -> Result<()> {
    if ranks == Ranks::ALONE {
        return Ok(());
    }
    let own = std::env::current_exe().map_err(|e| format!("this program's own file is not known: {e}"))?;
    let own = byol::nn::weights::sha256(&own)?;
    match ranks.differs(own.as_bytes()) {
        None => Ok(()),
        Some(other) => Err(train::Error::OtherRank {
            rank: other,
            what: "another program".into(),
            remedy: "install the same byol on all machines",
        }
        .into()),
    }
}

#[cfg(not(feature = "mpi"))]
fn join() -> Result<Joined> {
    match launched() {
        Some(n) if n > 1 => Err(format!(
            "{n} processes were started together, but this byol was built without MPI; build it with --features mpi, or start it without mpirun"
        )
        .into()),
        _ => Ok(Joined { ranks: Ranks::ALONE, local: [0, 1] }),
    }
}

#[cfg(feature = "mpi")]
fn join() -> Result<Joined> {
    use std::time::Duration;
    // Slurm with PMIx sets no size; one process without a launcher needs no MPI.
    if launched().is_none() && std::env::var_os("PMIX_RANK").is_none() {
        return Ok(Joined { ranks: Ranks::ALONE, local: [0, 1], session: None });
    }
    let session = byol::ranks::mpi::Session::start()
        .ok_or("the MPI library cannot be called from threads; use one with MPI_THREAD_SERIALIZED")?;
    let limit = match std::env::var("BYOL_RANK_TIMEOUT") {
        Err(_) => 1800.0,
        Ok(text) => text
            .parse()
            .ok()
            .filter(|s: &f64| (1.0..1e9).contains(s))
            .ok_or_else(|| format!("BYOL_RANK_TIMEOUT is a number of seconds from 1, not {text:?}"))?,
    };
    session.watch(Duration::from_secs_f64(limit), |waited| {
        let waited = report::duration(waited.as_secs_f64());
        report::error(&*Box::<dyn std::error::Error>::from(format!(
            "this rank has waited {waited} for the others: one hangs or has died; start again with `byol resume` (more patience: BYOL_RANK_TIMEOUT, in seconds)"
        )));
        mpi_abort();
    });
    let _ = WAITING.set(Box::new(session.waiting()));
    Ok(Joined { ranks: session.ranks, local: session.local, session: Some(session) })
}

#[cfg(feature = "mpi")]
type Waiting = Box<dyn Fn() -> Option<std::time::Duration> + Send + Sync>;

/// Whether this rank waits for the others, and for how long.
#[cfg(feature = "mpi")]
static WAITING: std::sync::OnceLock<Waiting> = std::sync::OnceLock::new();

/// After a signal: a launcher sends one when a rank has died, and the first that is left says what that means.
pub fn say_if_left_alone() {
    #[cfg(feature = "mpi")]
    if let Some(waiting) = WAITING.get() {
        let patience = std::time::Duration::from_millis(300);
        std::thread::sleep(patience);
        if waiting().is_some_and(|waited| waited >= patience) {
            report::error(&*Box::<dyn std::error::Error>::from(
                "the job was ended while this rank waited for the others: one has died or was stopped; go on from the last checkpoint with `byol resume`",
            ));
            std::process::exit(1);
        }
    }
}

#[cfg(feature = "mpi")]
fn mpi_abort() -> ! {
    byol::ranks::mpi::abort(1)
}

impl Joined {
    /// Threads of this process: what was asked for, or its share of the cores.
    pub fn threads(&self, asked: usize) -> usize {
        let machine = byol::device::machine();
        match asked {
            // A launcher may have bound each process to cores of its own.
            0 if byol::device::is_bound() => machine.cores,
            0 => (machine.cores / self.local[1]).max(1),
            n => n,
        }
    }

    /// Says how much of the time went into talking, if there was anybody to talk to.
    pub fn report(&self, steps: u64, seconds: f64) {
        let spent = self.ranks.spent();
        if self.ranks != Ranks::ALONE && steps > 0 {
            report::note(format!(
                "{} ranks: {:.2} MB and {:.0} messages a step from each, {:.1} ms a step of {:.1} ms spent on them",
                self.ranks.count(),
                spent.bytes as f64 / steps as f64 / 1e6,
                spent.messages as f64 / steps as f64,
                1e3 * spent.seconds / steps as f64,
                1e3 * seconds / steps as f64,
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
