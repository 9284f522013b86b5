//! tidepool-scheduler-core
