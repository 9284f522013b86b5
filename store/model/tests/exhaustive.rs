//! The protocols hold in every order of steps, and each rule left out is found.

use stateright::{Checker, Model};
use tidepool_store_model::gc::{self, Gc};
use tidepool_store_model::members::{self, Members};

const LOST: &str = "the chunks of live checkpoints are there";
const STAYS: &str = "what is committed stays";

#[test]
fn collection_loses_nothing() {
    let model = Gc {
        rounds: 2,
        without: None,
    };
    let checked = model.checker().threads(2).spawn_bfs().join();
    eprintln!("collection: {} states", checked.unique_state_count());
    checked.assert_properties();
}

#[test]
fn each_rule_of_collection_is_needed() {
    use gc::Rule::*;
    for rule in [
        Fence,
        Stamp,
        LowestRound,
        BeginFirst,
        CutFirst,
        WholeMark,
        RemovedAreRoots,
        LookAgain,
    ] {
        let model = Gc {
            rounds: 2,
            without: Some(rule),
        };
        let checked = model.checker().threads(2).spawn_bfs().join();
        eprintln!("without {rule:?}: {} states", checked.unique_state_count());
        assert!(checked.discovery(LOST).is_some(), "{rule:?} was not missed");
    }
}

#[test]
fn members_change_without_losing_what_is_committed() {
    let model = Members {
        terms: 2,
        log: 3,
        without: None,
    };
    let checked = model.checker().threads(2).spawn_bfs().join();
    eprintln!("members: {} states", checked.unique_state_count());
    checked.assert_properties();
}

#[test]
fn each_rule_of_a_change_is_needed() {
    use members::Rule::*;
    for rule in [Joint, OneAtATime, UpToDate] {
        let model = Members {
            terms: 3,
            log: 3,
            without: Some(rule),
        };
        let checked = model.checker().threads(2).spawn_bfs().join();
        assert!(
            checked.discovery(STAYS).is_some(),
            "{rule:?} was not missed"
        );
    }
}
