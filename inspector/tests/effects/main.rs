//! The inspector against real kernels: every filesystem operation, process events, and the ways to fail.
//!
//! Needs root and eBPF and fails where they are missing. Each test makes sandboxes (a process in its own
//! pid and mount namespaces with an overlay on ext4) out of this very binary: started with
//! [`sandbox::FLAG`] it is the sandbox's side. Hence a main of its own and no test harness; the
//! usual `cargo test -- name` filters and `--list` work.

mod cases;
mod child;
mod files;
mod ops;
mod outside;
mod processes;
mod sandbox;
mod sets;
mod surroundings;
mod thaws;
mod uring;

use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;

type Test = (&'static str, fn() -> anyhow::Result<()>);

const TESTS: &[Test] = &[
    (
        "every_operation_is_seen_at_its_path",
        files::every_operation_is_seen_at_its_path,
    ),
    ("reading_dirties_nothing", files::reading_dirties_nothing),
    (
        "rewrites_in_one_tick_are_seen_after_rearm",
        files::rewrites_in_one_tick_are_seen_after_rearm,
    ),
    (
        "stores_to_a_mapping_are_seen_after_rearm",
        files::stores_to_a_mapping_are_seen_after_rearm,
    ),
    (
        "mappings_are_armed_again_under_other_names",
        files::mappings_are_armed_again_under_other_names,
    ),
    (
        "rearm_does_not_leave_the_upper",
        files::rearm_does_not_leave_the_upper,
    ),
    (
        "shared_mappings_are_listed",
        files::shared_mappings_are_listed,
    ),
    (
        "overflow_means_everything_and_heals",
        files::overflow_means_everything_and_heals,
    ),
    (
        "other_filesystems_mean_everything",
        files::other_filesystems_mean_everything,
    ),
    (
        "nothing_is_lost_while_draining",
        files::nothing_is_lost_while_draining,
    ),
    (
        "sandboxes_do_not_see_each_other",
        files::sandboxes_do_not_see_each_other,
    ),
    (
        "a_new_slot_knows_nothing_of_the_old",
        files::a_new_slot_knows_nothing_of_the_old,
    ),
    (
        "writes_of_the_watching_process_do_not_count",
        files::writes_of_the_watching_process_do_not_count,
    ),
    (
        "writes_from_outside_are_seen",
        outside::writes_from_outside_are_seen,
    ),
    (
        "what_comes_into_an_upper_is_followed",
        outside::what_comes_into_an_upper_is_followed,
    ),
    (
        "other_writes_of_the_host_are_nobodys",
        outside::other_writes_of_the_host_are_nobodys,
    ),
    (
        "processes_are_born_and_end",
        processes::processes_are_born_and_end,
    ),
    (
        "lost_events_are_said_and_heal",
        processes::lost_events_are_said_and_heal,
    ),
    (
        "an_idle_sandbox_has_not_run",
        processes::an_idle_sandbox_has_not_run,
    ),
    (
        "tasks_are_the_same_in_both_ways",
        processes::tasks_are_the_same_in_both_ways,
    ),
    (
        "a_busy_task_always_counts_as_run",
        processes::a_busy_task_always_counts_as_run,
    ),
    (
        "activity_ends_the_quiet",
        processes::activity_ends_the_quiet,
    ),
    (
        "threads_find_back_after_a_freeze",
        thaws::threads_find_back_after_a_freeze,
    ),
    (
        "busy_threads_have_run_after_a_freeze",
        thaws::busy_threads_have_run_after_a_freeze,
    ),
    #[cfg(target_arch = "x86_64")]
    (
        "calls_with_old_numbers_have_run",
        thaws::calls_with_old_numbers_have_run,
    ),
    (
        "an_overflow_of_a_watch_means_that_something_ran",
        thaws::an_overflow_of_a_watch_means_that_something_ran,
    ),
    (
        "a_watch_leaves_nothing_attached",
        thaws::a_watch_leaves_nothing_attached,
    ),
    (
        "trampolines_see_the_same_or_are_refused",
        sets::trampolines_see_the_same_or_are_refused,
    ),
    #[cfg(target_arch = "x86_64")]
    (
        "system_calls_tell_that_files_may_have_changed",
        sets::system_calls_tell_that_files_may_have_changed,
    ),
    #[cfg(target_arch = "x86_64")]
    ("system_calls_see_mappings", sets::system_calls_see_mappings),
    (
        "a_walk_always_doubts_files_and_knows_tasks",
        sets::a_walk_always_doubts_files_and_knows_tasks,
    ),
    ("the_best_set_is_found", sets::the_best_set_is_found),
    (
        "nothing_stays_attached_without_sandboxes",
        sets::nothing_stays_attached_without_sandboxes,
    ),
    (
        "a_storm_stays_correct_and_bounded",
        sets::a_storm_stays_correct_and_bounded,
    ),
    ("a_storm_is_nobody_elses", sets::a_storm_is_nobody_elses),
    (
        "mounts_made_inside_are_seen",
        surroundings::mounts_made_inside_are_seen,
    ),
    (
        "namespaces_made_inside_are_seen",
        surroundings::namespaces_made_inside_are_seen,
    ),
    (
        "what_others_do_to_a_sleeping_process_is_seen",
        surroundings::what_others_do_to_a_sleeping_process_is_seen,
    ),
    (
        "a_sleeping_process_keeps_its_state",
        surroundings::a_sleeping_process_keeps_its_state,
    ),
    (
        "bad_registrations_are_refused",
        processes::bad_registrations_are_refused,
    ),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|a| a == sandbox::FLAG) {
        return child::run(&arguments[1..]);
    }
    if arguments.first().is_some_and(|a| a == sandbox::HOLD) {
        return child::hold(&arguments[1..]);
    }
    if arguments.iter().any(|a| a == "--list") {
        TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let filters: Vec<&String> = arguments.iter().filter(|a| !a.starts_with('-')).collect();
    let chosen =
        |name: &str| filters.is_empty() || filters.iter().any(|f| name.contains(f.as_str()));

    let mut failed = Vec::new();
    let mut errors = Vec::new();
    let mut passed = 0;
    for (name, test) in TESTS.iter().filter(|(name, _)| chosen(name)) {
        // The test's own values are all dropped by the unwinding; nothing is shared between tests.
        let outcome = panic::catch_unwind(AssertUnwindSafe(test));
        if matches!(outcome, Ok(Ok(()))) {
            passed += 1;
            println!("test {name} ... ok");
        } else {
            if let Ok(Err(error)) = outcome {
                println!("{error:?}");
                errors.push(format!("{name}: {error:#}"));
            }
            println!("test {name} ... FAILED");
            failed.push(*name);
        }
    }
    // Once more and without a backtrace, where whoever looks at the end of a long log sees them.
    errors.iter().for_each(|error| println!("{error}"));
    println!("\n{passed} passed; {} failed {failed:?}", failed.len());
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
