//! The protocols hold in every order of steps, and each rule left out is found.

use stateright::{Checker, Model};
use tidepool_store_model::gc::{self, Gc};

const LOST: &str = "the chunks of live checkpoints are there";

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
