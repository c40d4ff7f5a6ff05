//! Migrations that are part of the program.

use sqlx::migrate::{Migration, MigrationType, Migrator};

/// Runs what is missing of a list, in order; each `(description, sql)` has its position plus one as its version.
pub fn migrator(migrations: &'static [(&'static str, &'static str)]) -> Migrator {
    let list = migrations.iter().zip(1..).map(|((description, sql), version)| {
        let sql = sqlx::SqlSafeStr::into_sql_str(*sql);
        Migration::new(version, (*description).into(), MigrationType::Simple, sql, false)
    });
    Migrator::with_migrations(list.collect())
}
